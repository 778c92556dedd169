"""Perplexity, compared with transformers' own loss, the formula of the pruning papers, and closed forms."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.evaluation.huggingface import block_weights, evaluate_hf, zero_share
from maskllm.evaluation.perplexity import cut_windows, next_token_nll, perplexity
from maskllm.export.compress import CompressSettings, compress, decompress
from maskllm.huggingface.loading import load_hf_model, usable_device
from maskllm.huggingface.mask_file import open_mask_file, write_mask_file
from maskllm.huggingface.weights_hash import weights_sha256
from tests.families.tiny import write_tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 257, 600])
def test_next_token_nll_equals_log_softmax_in_double(dtype, length):
    torch.manual_seed(length)
    logits, tokens = (20 * torch.randn(length, 37)).to(dtype), torch.randint(37, (length,))
    expected = -logits.double().log_softmax(1)[torch.arange(length - 1), tokens[1:]].sum().item()
    assert next_token_nll(logits, tokens) == pytest.approx(expected, rel=1e-6)


def test_a_uniform_model_has_the_vocabularys_size_as_perplexity():
    windows = cut_windows(torch.randint(50, (103,)), 10)

    def uniform(batch):
        return [next_token_nll(torch.zeros(len(window), 50), window) for window in batch]

    result = perplexity(uniform, windows)
    assert result.perplexity == pytest.approx(50)
    assert (result.windows, result.seq_length, result.batch_size) == (10, 10, 1)


def test_windows_do_not_overlap_and_an_incomplete_one_is_dropped():
    assert cut_windows(torch.arange(23), 5).tolist() == [list(range(start, start + 5)) for start in range(0, 20, 5)]
    assert cut_windows(torch.arange(23), 5, 2).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_perplexity_equals_transformers_loss_in_the_papers_formula(model_directory, text_file):
    seq_length = 48
    result = evaluate_hf(model_directory, text_file, seq_length=seq_length, dtype=torch.float32, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    encoded = AutoTokenizer.from_pretrained(model_directory)(text_file.read_text(), return_tensors="pt").input_ids
    samples = encoded.numel() // seq_length
    nlls = []
    with torch.no_grad():
        for sample in range(samples):
            batch = encoded[:, sample * seq_length : (sample + 1) * seq_length]
            nlls.append(model(batch, labels=batch).loss.double() * seq_length)
    expected = torch.exp(torch.stack(nlls).sum() / (samples * seq_length)).item()
    assert samples > 5
    assert result.perplexity == pytest.approx(expected, rel=1e-6)
    assert (result.windows, result.text_tokens, result.dtype, result.data_kind) == (samples, encoded.numel(), "float32", "text")


def test_the_default_dtype_is_the_checkpoints_if_the_cpu_supports_it(model_directory, monkeypatch):
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda answer=supported: answer)
        model = load_hf_model(model_directory, device=torch.device("cpu"))
        assert model.dtype == dtype and not model.training
        stored = AutoModelForCausalLM.from_pretrained(model_directory).state_dict()
        assert all(torch.equal(weight.to(torch.bfloat16), stored[name]) for name, weight in model.state_dict().items())


def test_command_line_writes_what_it_prints(model_directory, text_file, tmp_path, capsys):
    arguments = ["--model", str(model_directory), "--data", str(text_file), "--seq-length", "32", "--max-windows", "3"]
    assert main(["evaluate", *arguments, "--json", str(tmp_path / "out.json")]) == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert f"perplexity {numbers['perplexity']:.4f} (3 windows of 32 tokens, text" in capsys.readouterr().out
    assert numbers["windows"] == 3 and numbers["zeros"] == 0 and numbers["mask"] is None
    assert numbers["weights_sha256"] == weights_sha256(model_directory) and numbers["mask_sha256"] is None
    assert numbers["versions"]["torch"] == torch.__version__ and {"maskllm", "commit"} <= numbers["versions"].keys()
    assert math.log(numbers["perplexity"]) == pytest.approx(numbers["nll"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--model", "nowhere"], "nowhere: no such directory"),
        (["--data", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--seq-length", "65"], "--seq-length 65: the model has a context of 64 tokens"),
        (["--seq-length", "1"], "a window needs at least 2 tokens"),
        (["--max-windows", "0"], "--max-windows 0"),
        (["--data", "short.txt"], "less than one window of 32"),
        (["--mask", "nowhere.npz"], "nowhere.npz: no such mask file"),
        (["--mask", "owner/masks"], "owner/masks: no such mask file, and the hub does not give it"),
    ],
)
def test_bad_input_ends_with_one_line(model_directory, text_file, tmp_path, monkeypatch, capsys, changed, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a b c")
    arguments = ["--model", str(model_directory), "--data", str(text_file), "--seq-length", "32", *changed]
    assert main(["evaluate", *arguments]) == 1
    last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert last.startswith("maskllm evaluate: error: ") and message in last


def test_a_damaged_model_and_a_model_that_overflows(model_directory, text_file, tmp_path):
    for file in model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"garbage!")
    with pytest.raises(MaskLLMError, match=r"model\.safetensors: not a readable safetensors file"):
        evaluate_hf(tmp_path, text_file, seq_length=32)
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    model.lm_head.weight.data[3] = math.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(MaskLLMError, match="likelihood of window 1 is not a number"):
        evaluate_hf(tmp_path, text_file, seq_length=32)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"llama"', '"no-such-family"'))
    with pytest.raises(MaskLLMError, match="transformers cannot load it"):
        load_hf_model(tmp_path, device=torch.device("cpu"))


def test_a_model_without_one_of_its_tensors_is_refused(model_directory, text_file, tmp_path, capfd):
    """transformers would initialize the tensor at random, with only a warning."""
    for file in model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert main(["evaluate", "--model", str(tmp_path), "--data", str(text_file), "--seq-length", "32"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"maskllm evaluate: error: {tmp_path}: has no tensor model.layers.1.mlp.up_proj.weight and 1 more, which the model"
    )


def test_a_tokenizer_of_another_model_is_refused(model_directory, text_file, tmp_path):
    for file in model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    with pytest.raises(MaskLLMError, match="tokenizer: found token 299, wanted less than the model's vocabulary of 100"):
        evaluate_hf(tmp_path, text_file, seq_length=32)


def test_options_are_checked_before_the_model_is_loaded(model_directory, text_file, tmp_path):
    broken = shutil.copytree(model_directory, tmp_path / "broken")
    (broken / "model.safetensors").write_text("")
    with pytest.raises(MaskLLMError, match=r"nowhere\.npz: no such mask file"):
        evaluate_hf(broken, text_file, seq_length=8, mask_file=tmp_path / "nowhere.npz")
    with pytest.raises(MaskLLMError, match="--max-windows 0: wanted at least 1"):
        evaluate_hf(broken, text_file, seq_length=8, max_windows=0)


def test_a_mask_file_gives_the_perplexity_of_the_masked_model(model_directory, text_file, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    weights = block_weights(model)
    assert len(weights) == 2 * 7 and not any("lm_head" in name or "embed" in name for name in weights)
    torch.manual_seed(1)
    masks = {}
    for name, weight in weights.items():  # 2 of 4
        order = torch.rand(weight.shape[0], weight.shape[1] // 4, 4).argsort(-1)
        masks[name] = (order < 2).flatten(1)
        weight *= masks[name]
    assert zero_share(weights) == 0.5
    model.save_pretrained(tmp_path / "sparse")
    for file in model_directory.glob("tokenizer*"):
        (tmp_path / "sparse" / file.name).write_bytes(file.read_bytes())
    write_mask_file(tmp_path / "masks.npz", masks.items())
    arguments = ["--data", str(text_file), "--seq-length", "48", "--params-dtype", "fp32", "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", "--model", str(model_directory), "--mask", str(tmp_path / "masks.npz"), *arguments]) == 0
    masked = json.loads((tmp_path / "out.json").read_text())
    base = {name: mask.roll(1, 0) for name, mask in masks.items()}
    write_mask_file(tmp_path / "base.npz", base.items())
    write_mask_file(tmp_path / "difference.npz", masks.items(), open_mask_file(tmp_path / "base.npz"))
    difference = ["--mask", str(tmp_path / "difference.npz"), "--mask-base", str(tmp_path / "base.npz")]
    assert main(["evaluate", "--model", str(model_directory), *difference, *arguments]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["perplexity"] == masked["perplexity"]
    with pytest.raises(MaskLLMError, match="--mask-base: belongs to a mask file"):
        evaluate_hf(model_directory, text_file, seq_length=48, mask_base=tmp_path / "base.npz")
    sparse = evaluate_hf(tmp_path / "sparse", text_file, seq_length=48, dtype=torch.float32)
    dense = evaluate_hf(model_directory, text_file, seq_length=48, dtype=torch.float32)
    assert masked["perplexity"] == pytest.approx(sparse.perplexity, rel=1e-9)
    assert abs(math.log(dense.perplexity / sparse.perplexity)) > 0.01
    assert masked["zeros"] == sparse.zeros == 0.5 and dense.zeros == 0


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_named(device):
    with pytest.raises(MaskLLMError, match=f"--device {device}: cannot be used here"):
        usable_device(device)
    assert usable_device("cpu").type == "cpu"


def test_both_paths_agree_beyond_the_length_that_dynamic_rotary_embeddings_stretch(model_directory, text_file, tmp_path, capsys):
    """The frequencies depend on the length of the sequence, so both paths must see windows of one length."""
    source = shutil.copytree(model_directory, tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}))
    assert main(["convert", "--hf", str(source), "--output", str(tmp_path / "dense")]) == 0
    arguments = ["--data", str(text_file), "--params-dtype", "fp32", "--json", str(tmp_path / "out.json")]
    found = {}
    for length in (64, 65, 200):
        for path in (["--model", str(source)], ["--load", str(tmp_path / "dense")]):
            assert main(["evaluate", *path, *arguments, "--seq-length", str(length)]) == 0
            found[path[0], length] = json.loads((tmp_path / "out.json").read_text())["perplexity"]
        assert found["--load", length] == pytest.approx(found["--model", length], rel=1e-5)
    assert main(["evaluate", "--load", str(tmp_path / "dense"), *arguments, "--seq-length", "257"]) == 1
    assert "--seq-length 257: the model has a context of 256 tokens" in capsys.readouterr().err


def test_scores_are_soft_capped_in_every_allowed_transformers(tmp_path):
    model = write_tiny("gemma2", tmp_path)
    model.set_attn_implementation("eager")
    tokens = torch.arange(96)[None]
    found = load_hf_model(tmp_path, device=torch.device("cpu"))(tokens).logits
    torch.testing.assert_close(found, model(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_compressed_model_has_the_perplexity_of_its_dense_form(bits, model_directory, text_file, tmp_path, capsys):
    weights = block_weights(model := load_hf_model(model_directory, device=torch.device("cpu"), dtype=torch.bfloat16))
    for name, weight in weights.items():
        if "layers.1.mlp.up" not in name:  # one stays dense
            weight *= (weight.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1) > 1).flatten(1)
    model.save_pretrained(tmp_path / "sparse")
    shutil.copy(model_directory / "tokenizer.json", tmp_path / "sparse")
    shutil.copy(model_directory / "tokenizer_config.json", tmp_path / "sparse")
    compress(tmp_path / "sparse", tmp_path / "small", CompressSettings(bits, group_size=16))
    decompress(tmp_path / "small", tmp_path / "back")
    for dtype in (None, torch.float32):
        small, back = (
            evaluate_hf(tmp_path / name, text_file, seq_length=32, max_windows=2, dtype=dtype, device="cpu")
            for name in ("small", "back")
        )
        assert small.perplexity == pytest.approx(back.perplexity, rel=2e-2 if bits else 1e-5)
        assert (small.zeros, small.dtype) == (back.zeros, back.dtype)
    arguments = ["--data", str(text_file), "--seq-length", "32", "--device", "cpu"]
    write_mask_file(tmp_path / "masks.npz", [(name, weight != 0) for name, weight in weights.items()])
    assert main(["evaluate", "--model", str(tmp_path / "small"), "--mask", str(tmp_path / "masks.npz"), *arguments]) == 1
    assert "small: its weights are compressed; use masks before that, with maskllm compress --mask" in capsys.readouterr().err
