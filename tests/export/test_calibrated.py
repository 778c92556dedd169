"""`maskllm compress --calibration-data`: against the same sweep on a model in memory, and one block in memory at a time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.compress import CompressSettings, compress, decompress
from maskllm.huggingface.block_stream import BlockStream
from maskllm.huggingface.blocks import block_linears, block_stacks, matrix
from maskllm.huggingface.mask_file import open_base, write_mask_file
from maskllm.huggingface.tensors import HFTensors
from maskllm.ops.sparse_linear import Layout
from maskllm.patterns import Pattern
from maskllm.pruning.calibration import Calibration
from maskllm.pruning.quantize import quantize_matrices
from maskllm.pruning.statistics import InputStatistics
from tests.export.test_compress import files_of, tensors_of, write_unstructured
from tests.families.tiny import write_tiny
from tests.inference.sparse_models import sparse_model, write_sparse
from tests.pruning.test_calibration import write_indexed

SETTINGS = CompressSettings(4, group_size=16)


@pytest.fixture
def calibration(tmp_path: Path) -> Calibration:
    """Four windows of ten tokens of an indexed dataset."""
    generator = np.random.default_rng(0)
    write_indexed(tmp_path / "data", [generator.integers(3, 90, 30) for _ in range(6)])
    return Calibration(str(tmp_path / "data"), samples=4, seq_length=10, params_dtype=torch.float32)


def input_statistics(model, tokens, names):
    """The statistics of each linear's inputs, from forward passes of the whole model."""
    linears = {name: model.get_submodule(name) for name in names}
    statistics = {name: InputStatistics(matrix(linear).shape[1]) for name, linear in linears.items()}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: statistics[name].add(args[0]))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        for row in tokens.split(1):
            model(row)
    for handle in handles:
        handle.remove()
    return statistics


@pytest.mark.parametrize(("kind", "n", "m"), [("llama3", 2, 4), ("gpt2", 1, 4), ("gemma3", 2, 4), ("biases", 3, 8)])
def test_each_block_is_swept_on_the_inputs_of_the_quantized_blocks_before_it(kind, n, m, calibration, tmp_path):
    write_sparse(tmp_path / "hf", kind, torch.float32, n, m)
    report = compress(tmp_path / "hf", tmp_path / "small", SETTINGS, calibration=calibration)
    decompress(tmp_path / "small", tmp_path / "back")
    found, original = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("back", "hf"))
    tokens = calibration.tokens("", context=None, vocabulary=96)
    ((prefix, blocks),) = block_stacks(original).items()
    for index in range(len(blocks)):
        names = [name for name in block_linears(original) if name.startswith(f"{prefix}.{index}.")]
        mixed = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        for before in range(index):
            mixed.get_submodule(prefix)[before].load_state_dict(found.get_submodule(prefix)[before].state_dict())
        for name, own in input_statistics(mixed, tokens, names).items():
            weight = matrix(original.get_submodule(name))
            wanted = quantize_matrices({name: weight}, own, {name: Layout(Pattern(n, m), 4, 16)})[name]
            torch.testing.assert_close(matrix(found.get_submodule(name)), wanted.weight, rtol=1e-5, atol=1e-6)
            (entry,) = (entry for key, entry in report.matrices.items() if name.endswith(key))
            assert entry["relative_error"] == pytest.approx(wanted.report["relative_error"], rel=1e-3)
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert all(((before[key] == 0) <= (after[key] == 0)).all() for key in before)


def test_the_weights_of_one_block_are_in_memory_at_a_time(tmp_path):
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    tensors = HFTensors(tmp_path / "hf")
    stream = BlockStream(tmp_path / "hf", tensors, dtype=torch.float32, device=torch.device("cpu"), load=tensors.load)

    def in_memory():
        parameters = stream.model.named_parameters()
        return {name.split(".")[2] for name, parameter in parameters if ".layers." in name and not parameter.is_meta}

    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens, seen = torch.arange(3, 20)[None], []
    assert in_memory() == set()
    for block in stream.blocks.values():
        block.register_forward_hook(lambda *_: seen.append(in_memory()))
    with stream.running() as model, torch.no_grad():
        torch.testing.assert_close(model.base_model(tokens)[0], whole.base_model(tokens)[0])
    assert seen == [{"0"}, {"1"}] and in_memory() == set()


def test_matrices_that_stay_dense_and_a_mask_file_with_a_base(calibration, tmp_path, capsys):
    """The command: masks as a difference, JSON lines instead of a dataset, and a matrix without zeros."""
    write_tiny("llama3", tmp_path / "dense", torch.float32)
    model = sparse_model("llama3")
    masks = {f"{name}.weight": linear.weight != 0 for name, linear in block_linears(model).items()}
    write_mask_file(tmp_path / "base.npz", [(name, torch.zeros_like(mask)) for name, mask in masks.items()])
    masks["model.layers.1.mlp.up_proj.weight"][:] = True
    write_mask_file(tmp_path / "masks.npz", masks.items(), open_base(tmp_path / "base.npz"))
    arguments = [
        "compress",
        "--model",
        str(tmp_path / "dense"),
        "--output",
        str(tmp_path / "small"),
        "--bits",
        "8",
        "--group-size",
        "16",
    ]
    masked = [
        "--mask",
        str(tmp_path / "masks.npz"),
        "--mask-base",
        str(tmp_path / "base.npz"),
        "--json",
        str(tmp_path / "report.json"),
    ]
    data = ["--calibration-data", calibration.data, "--calibration-samples", "4", "--seq-length", "10", "--params-dtype", "fp32"]
    assert main([*arguments, *masked, *data]) == 0
    printed = capsys.readouterr().out
    assert (
        "13 matrices calibrated: on the calibration text their outputs change by 0." in printed
        and "stays dense: model.layers.1.mlp.up_proj" in printed
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"] == calibration.as_dict() and report["mask_base"] == str(tmp_path / "base.npz")
    assert all(entry["relative_error"] < entry["nearest_error"] for entry in report["matrices"].values())
    decompress(tmp_path / "small", tmp_path / "back")
    before, after = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "back")
    for name, mask in masks.items():
        assert ((after[name] != 0) <= mask).all() and torch.equal(before[name], after[name]) == mask.all()


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_unstructured_matrices_keep_their_zeros_and_no_others(zero, calibration, tmp_path):
    write_unstructured(tmp_path / "hf", zero)
    report = compress(tmp_path / "hf", tmp_path / "small", SETTINGS, calibration=calibration)
    assert all(matrix["pattern"] is None and "relative_error" in matrix for matrix in report.matrices.values())
    decompress(tmp_path / "small", tmp_path / "back")
    before, after, small = (tensors_of(tmp_path / name) for name in ("hf", "back", "small"))
    for name in report.matrices:
        kept = before[f"{name}.weight"] != 0
        assert small[f"{name}.row_starts"][-1] == kept.sum() and not after[f"{name}.weight"][~kept].any()


def test_the_default_dtype(calibration, tmp_path):
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    default = Calibration(calibration.data, 4, 10, params_dtype=None)
    report = compress(tmp_path / "hf", tmp_path / "small", CompressSettings(8, 16), calibration=default)
    assert report.calibration["params_dtype"] in ("float32", "bfloat16")
    plain = compress(tmp_path / "hf", tmp_path / "plain", CompressSettings(8, 16))
    assert (
        report.bytes == plain.bytes and plain.calibration is None and files_of(tmp_path / "small") != files_of(tmp_path / "plain")
    )


def test_refused(calibration, tmp_path, capsys):
    write_sparse(tmp_path / "hf", "llama3", torch.bfloat16)
    arguments = ["compress", "--model", str(tmp_path / "hf"), "--output", str(tmp_path / "no")]
    data = ["--calibration-data", calibration.data]
    for extra, message in (
        (data, "--calibration-data .*: chooses integers; wanted --bits 8 or 4 too"),
        (["--bits", "8", "--device", "cpu"], "--device: nothing is computed without --calibration-data"),
        (["--decompress", *data], "--calibration-data: does not go with --decompress"),
        (["--decompress", "--seed", "1234"], "--seed: does not go with --decompress"),
        (["--calibration-samples", "128"], "--calibration-samples: belongs to --calibration-data, which is not given"),
        (["--bits", "8", "--seq-length", "2048"], "--seq-length: belongs to --calibration-data"),
        (["--seed", "0"], "--seed: belongs to --calibration-data"),
        (["--pack"], "--pack: belongs to --calibration-data"),
        (["--bits", "8", *data, "--seed", "-1"], "--seed -1: wanted a number of at least 0"),
        (["--bits", "8", *data, "--calibration-samples", "0"], "--calibration-samples 0: wanted a positive number"),
        (["--bits", "8", *data, "--seq-length", "1000"], "--seq-length 1000: the model has a context of 512 tokens"),
        (["--bits", "8", *data, "--seq-length", "40"], "none of the 6 calibration documents is longer than 40 tokens"),
        (["--bits", "8", "--calibration-data", str(tmp_path / "x"), "--seq-length", "10"], "wanted an indexed dataset's prefix"),
        (["--mask-base", "x.npz"], "--mask-base: belongs to a mask file that is a difference"),
    ):
        assert main([*arguments, *extra]) == 1
        assert re.search(message, capsys.readouterr().err), message
    write_sparse(tmp_path / "t5", "t5")
    with pytest.raises(MaskLLMError, match="t5: transformers cannot make a causal language model of it"):
        compress(tmp_path / "t5", tmp_path / "no", CompressSettings(8), calibration=calibration)
    assert not (tmp_path / "no").exists()
