"""`maskllm compress` and back: the same bits, sizes, and what is refused."""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.compress import CompressSettings, compress, decompress
from maskllm.huggingface.blocks import block_linears
from maskllm.huggingface.mask_file import open_mask_file, write_mask_file
from maskllm.huggingface.shards import TensorSpec, write_shards
from maskllm.huggingface.weights_hash import StatedHash, weights_sha256, write_hash
from maskllm.ops.sparse_linear import Layout, sparse_expand
from maskllm.patterns import Pattern
from tests.families.tiny import write_tiny
from tests.inference.sparse_models import sparse_model, write_sparse


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors in a Hugging Face directory."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("kind", "dtype", "n", "m"),
    [
        ("llama3", torch.bfloat16, 2, 4),
        ("llama3", torch.float32, 1, 4),
        ("gpt2", torch.float16, 2, 4),
        ("biases", torch.bfloat16, 7, 16),
        ("phi3", torch.bfloat16, 4, 8),
        ("t5", torch.float32, 5, 16),
        ("whisper", torch.bfloat16, 2, 4),
    ],
)
def test_decompress_gives_every_file_back(kind, dtype, n, m, tmp_path):
    write_sparse(tmp_path / "hf", kind, dtype, n, m)
    (tmp_path / "hf" / "LICENSE").write_text("free")
    write_hash(tmp_path / "hf", StatedHash(weights_sha256(tmp_path / "hf")))
    (tmp_path / "hf" / "additional_chat_templates").mkdir()
    (tmp_path / "hf" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    report = compress(tmp_path / "hf", tmp_path / "small")
    assert {matrix["pattern"] for matrix in report.matrices.values()} == {f"{n}:{m}"} and not report.dense
    assert decompress(tmp_path / "small", tmp_path / "back") == report.bytes_before
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")
    assert json.loads((tmp_path / "small" / "weights_sha256.json").read_text())["weights_sha256"] == weights_sha256(
        tmp_path / "small"
    )
    small = tensors_of(tmp_path / "small")
    assert report.bytes == sum(tensor.nbytes for tensor in small.values())
    assert report.compressed_bytes == sum(small[key].nbytes for key in small if key.endswith((".values", ".places")))
    assert {str(path) for path in files_of(tmp_path / "hf")} <= {str(path) for path in files_of(tmp_path / "small")}


def test_sizes_of_a_two_of_four_model_in_16_bits(tmp_path):
    report = compress(write_sparse(tmp_path / "hf", "llama3", torch.bfloat16), tmp_path / "small")
    assert report.compressed_bytes / report.dense_bytes == 0.5 + 1 / 16


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("maskllm.export.compress.write_shards", functools.partial(write_shards, max_shard_size="8KB"))
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    compress(tmp_path / "hf", tmp_path / "small")
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 3
    decompress(tmp_path / "small", tmp_path / "back")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys() and all(same_bits(before[key], after[key]) for key in before)


def test_the_command_says_what_stays_dense(tmp_path, capsys):
    model = sparse_model("llama3", torch.bfloat16)
    linears = block_linears(model)
    torch.nn.init.normal_(linears["model.layers.1.mlp.up_proj"].weight)
    linears["model.layers.0.mlp.up_proj"].weight.data[0, :3] = 1  # unstructured
    model.save_pretrained(tmp_path / "hf")
    arguments = ["--model", str(tmp_path / "hf"), "--json", str(tmp_path / "report.json")]
    assert main(["compress", *arguments, "--output", str(tmp_path / "small")]) == 0
    printed = capsys.readouterr().out
    assert "stays dense: model.layers.1.mlp.up_proj (0.0% zeros)" in printed
    assert "13 matrices compressed (2:4: 12, " in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["dense"] == {"model.layers.1.mlp.up_proj": 0.0}
    small = tensors_of(tmp_path / "small")
    assert same_bits(small["model.layers.1.mlp.up_proj.weight"], model.state_dict()["model.layers.1.mlp.up_proj.weight"])

    assert main(["compress", *arguments, "--output", str(tmp_path / "two"), "--pattern", "2:4"]) == 0
    assert "stays dense: model.layers.0.mlp.up_proj (" in capsys.readouterr().out
    assert main(["compress", *arguments[:2], "--decompress", "--output", str(tmp_path / "x")]) == 1
    assert "hf/config.json: has no quantization_config of maskllm" in capsys.readouterr().err
    assert main(["compress", "--model", str(tmp_path / "small"), "--decompress", "--output", str(tmp_path / "back")]) == 0
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")


def write_unstructured(path: Path, zero: float) -> None:
    """A tiny model in fp32 of which 60 % of the blocks' weights, in any places but the first 16 columns, are this zero."""
    model = sparse_model("gpt2", torch.float32)
    for linear in block_linears(model).values():  # Conv1D: columns come first
        torch.nn.init.normal_(linear.weight).data[16:].masked_fill_(torch.rand_like(linear.weight[16:]) < 0.6, zero)
    model.save_pretrained(path)


def test_unstructured_zeros(tmp_path):
    write_unstructured(tmp_path / "hf", 0.0)
    report = compress(tmp_path / "hf", tmp_path / "small")
    assert {matrix["pattern"] for matrix in report.matrices.values()} == {None}
    decompress(tmp_path / "small", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "hf")


@pytest.mark.parametrize("bits", [None, 8])
def test_unstructured_negative_zeros_are_not_stored(bits, tmp_path):
    write_unstructured(tmp_path / "hf", -0.0)
    report = compress(tmp_path / "hf", tmp_path / "small", CompressSettings(bits))
    decompress(tmp_path / "small", tmp_path / "back")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    lost = 0
    for name in report.matrices:
        one, other = before[f"{name}.weight"], after[f"{name}.weight"]
        zeros = one == 0
        assert not other[zeros].signbit().any() and not other[zeros].any()
        assert bits or torch.equal(one, other)
        lost += int(zeros.sum())
    assert lost > 0 and report.negative_zeros == (0 if bits else lost)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
def test_integers_are_within_half_a_step(bits, levels, tmp_path):
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    compress(tmp_path / "hf", tmp_path / "small", CompressSettings(bits, group_size=16))
    decompress(tmp_path / "small", tmp_path / "back")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    small = tensors_of(tmp_path / "small")
    assert before.keys() == after.keys()
    for name in (name.removesuffix(".scales") for name in small if name.endswith(".scales")):
        weight, rounded = (tensors[f"{name}.weight"].float() for tensors in (before, after))
        groups = weight.unflatten(1, (-1, 16)).abs().amax(-1) / levels
        torch.testing.assert_close(small[f"{name}.scales"], groups)
        step = groups.repeat_interleave(16, 1)
        assert ((weight - rounded).abs() <= step / 2 + weight.abs() / 256).all(), name
        assert ((weight == 0) <= (rounded == 0)).all()
        assert after[f"{name}.weight"].dtype == torch.bfloat16


def test_fewer_bits_of_fp32_weights(tmp_path):
    write_sparse(tmp_path / "hf", "llama3", torch.float32)
    compress(tmp_path / "hf", tmp_path / "small", CompressSettings(16))
    decompress(tmp_path / "small", tmp_path / "back")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    for name, tensor in before.items():
        wanted = tensor.bfloat16().float() if ".layers." in name and "norm" not in name else tensor
        assert same_bits(after[name], wanted), name


def test_a_mask_file_is_applied_first(tmp_path):
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    write_tiny("gpt2", dense, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(dense)
    masks = {}
    for name, linear in block_linears(model).items():
        masks[f"{name}.weight"] = (torch.arange(linear.weight.shape[0]) % 4 < 2)[:, None].expand_as(linear.weight)
        linear.weight.data.masked_fill_(~masks[f"{name}.weight"], 0)
    model.save_pretrained(sparse)
    write_mask_file(tmp_path / "masks.npz", masks.items())
    compress(dense, tmp_path / "small", masks=open_mask_file(tmp_path / "masks.npz"))
    decompress(tmp_path / "small", tmp_path / "back")
    before, after = tensors_of(sparse), tensors_of(tmp_path / "back")
    assert all(same_bits(before[name], after[name]) for name in before)
    write_mask_file(tmp_path / "few.npz", list(masks.items())[:3])
    with pytest.raises(MaskLLMError, match=r"few.npz: no mask for transformer.h"):
        compress(dense, tmp_path / "no", masks=open_mask_file(tmp_path / "few.npz"))


def test_negative_zeros_are_counted(tmp_path):
    model = sparse_model("llama3", torch.float32)
    weight = block_linears(model)["model.layers.0.mlp.up_proj"].weight.data
    weight[weight == 0] = -0.0
    count = int((weight == 0).sum())
    weight[3, 8:12] = torch.tensor([1.0, -0.0, -0.0, -0.0])  # one of them has room
    model.save_pretrained(tmp_path / "hf")
    report = compress(tmp_path / "hf", tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "back")
    before, after = (tensors_of(tmp_path / name)["model.layers.0.mlp.up_proj.weight"] for name in ("hf", "back"))
    assert torch.equal(before, after)
    assert report.negative_zeros == int((before.signbit() != after.signbit()).sum()) == count


def test_refused(tmp_path):
    write_tiny("llama3", tmp_path / "dense", torch.bfloat16)
    with pytest.raises(
        MaskLLMError, match=r"none of the 14 matrices of its blocks is sparse enough to save bytes; the sparsest has 0.0%"
    ):
        compress(tmp_path / "dense", tmp_path / "no")
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    with pytest.raises(MaskLLMError, match=r"is of the pattern 1:4; the sparsest has 50.0% zeros"):
        compress(tmp_path / "hf", tmp_path / "no", CompressSettings(pattern=Pattern(1, 4)))
    with pytest.raises(MaskLLMError, match=r"--bits 32: model.layers.* has 16 bits a weight"):
        compress(tmp_path / "hf", tmp_path / "no", CompressSettings(32))
    compress(tmp_path / "hf", tmp_path / "small")
    with pytest.raises(MaskLLMError, match="small: its weights are quantized or compressed already"):
        compress(tmp_path / "small", tmp_path / "no")
    with pytest.raises(MaskLLMError, match=r"--output .*small exists and is not an empty directory"):
        decompress(tmp_path / "small", tmp_path / "small")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"architectures": ["Nothing"]}))
    with pytest.raises(MaskLLMError, match="architectures is Nothing; wanted one that transformers has"):
        compress(tmp_path / "hf", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_options_that_do_not_go_together(tmp_path, capsys):
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    arguments = ["compress", "--model", str(tmp_path / "hf"), "--output", str(tmp_path / "no")]
    for extra, message in (
        (["--group-size", "64"], "--group-size 64: scales belong to --bits 8 and 4"),
        (["--bits", "8", "--group-size", "0"], "--group-size 0: wanted a positive number or -1"),
        (["--decompress", "--bits", "8"], "--bits: does not go with --decompress"),
        (["--bits", "4", "--group-size", "6", "--pattern", "2:4"], "--group-size 6: wanted a multiple of 4"),
    ):
        assert main([*arguments, *extra]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2 of a compressed checkpoint; this maskllm reads 1"),
        ({"layouts": 3}, "layouts of quantization_config is int"),
        ({"layouts": [{"pattern": "2:4", "bits": True}]}, "a layout of quantization_config is not understood"),
        ({"layouts": "same", "dtype": []}, r"config\.json: a layout of quantization_config is not understood"),
        ({"layouts": "same", "pattern": "9:4"}, r"config\.json: a layout of quantization_config: pattern 9:4"),
        ({"layouts": "same", "bits": 5}, r"config\.json: a layout of quantization_config: bits 5"),
        (
            {"layouts": "same", "bits": 8, "group_size": 6},
            r"config\.json: a layout of quantization_config: group size 6 with 8 bits",
        ),
        ({"layouts": "same", "matrices": {"a": [4, 1 << 40]}}, r"config\.json: a has shape"),
        ({"layouts": "same", "matrices": {"a": [4, 10]}}, r"config\.json: a: its \(shard's\) input dimension 10"),
        ({"layouts": "same", "matrices": {"a": [4, 8]}}, "has no tensor a.values"),
        ({"layouts": "same", "pattern": "4:8"}, "places is U8|values is BF16|U8"),
        ({"layouts": "same", "pattern": "1:4"}, "is U8|is BF16"),
        ({"layouts": "same", "bits": 8}, "is BF16|has no tensor"),
        ({"layouts": "same", "dtype": "float32", "bits": 32}, "is BF16"),
    ],
)
def test_a_crafted_config_is_refused_by_name(change, message, tmp_path):
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    compress(tmp_path / "hf", tmp_path / "small")
    path, given = tmp_path / "small" / "config.json", change
    config = json.loads(path.read_text())
    if change.get("layouts") == "same":
        change = {"layouts": [config["quantization_config"]["layouts"][0] | {k: v for k, v in change.items() if k != "layouts"}]}
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    if '"4:8"' in path.read_text():  # the same sizes: the places of 2:4 are no bits of 4:8
        message = "places"
    with pytest.raises(MaskLLMError, match=message):
        decompress(tmp_path / "small", tmp_path / "back")
    if list(change) != ["layouts"] or "matrices" not in given:  # transformers loads parts of models
        with pytest.raises(MaskLLMError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert not (tmp_path / "back").exists()


def test_stored_tensors_are_what_the_operators_take(tmp_path):
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    compress(tmp_path / "hf", tmp_path / "small")
    small, name = tensors_of(tmp_path / "small"), "model.layers.1.self_attn.o_proj"
    stored = {key: small[f"{name}.{key}"] for key in ("values", "places")}
    weight = tensors_of(tmp_path / "hf")[f"{name}.weight"]
    assert same_bits(sparse_expand(stored, Layout(Pattern(2, 4), 16), weight.shape[1], torch.bfloat16), weight)
    assert TensorSpec("BF16", (32, 16)).nbytes == stored["values"].nbytes


def test_a_damaged_file(tmp_path):
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    compress(tmp_path / "hf", tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    for load in (
        lambda: decompress(tmp_path / "small", tmp_path / "no"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "small"),
    ):
        with pytest.raises(MaskLLMError, match=r"small/model.safetensors: not a readable safetensors file"):
            load()
    file.write_bytes(whole)
    tensors = tensors_of(tmp_path / "small")
    tensors["model.layers.0.mlp.up_proj.places"][5, 1] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    for load in (
        lambda: decompress(tmp_path / "small", tmp_path / "no"),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "small"),
    ):
        with pytest.raises(
            MaskLLMError, match=r"model.safetensors: model.layers.0.mlp.up_proj.places: row 5, block 2 keeps columns 0 and 0"
        ):
            load()
    del tensors["model.layers.0.mlp.up_proj.places"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(MaskLLMError, match=r"small: has no tensor model.layers.0.mlp.up_proj.places"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_mutated_files_are_refused_by_maskllm_or_read(tmp_path, monkeypatch):
    """Bits flipped, bytes removed and inserted, half of them in a header: no other error, and nothing outside of the tensors is read."""
    monkeypatch.setattr("maskllm.export.compress.tqdm", functools.partial(tqdm, disable=True))
    model = sparse_model("llama3", torch.bfloat16)
    unstructured = block_linears(model)["model.layers.0.mlp.up_proj"].weight.data
    unstructured.normal_().masked_fill_(torch.rand(unstructured.shape) < 0.7, 0)
    model.save_pretrained(tmp_path / "hf")
    generator = random.Random(0)
    refused = 0
    for name, bits in (("same", None), ("few", 4)):
        compress(tmp_path / "hf", tmp_path / name, CompressSettings(bits, group_size=16))
        for file in [tmp_path / name / "model.safetensors"] * 40 + [tmp_path / name / "config.json"] * 20:
            whole = file.read_bytes()
            header = 8 + int.from_bytes(whole[:8], "little") if file.suffix == ".safetensors" else len(whole)
            place = generator.randrange(header if generator.random() < 0.5 else len(whole))
            changed = generator.choice(
                [bytes([whole[place] ^ 1 << generator.randrange(8)]), b"", b"0", b"-", b"99999999999", b"null"]
            )
            file.write_bytes(whole[:place] + changed + whole[place + generator.choice([0, 1]) :])
            try:
                decompress(tmp_path / name, tmp_path / "back")
            except MaskLLMError:
                refused += 1
            shutil.rmtree(tmp_path / "back", ignore_errors=True)
            file.write_bytes(whole)
    assert 60 < refused < 120
