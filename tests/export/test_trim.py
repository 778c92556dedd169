"""Trim: winners by brute force, kept weights bit for bit, nothing else left."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.info import CheckpointInfo
from maskllm.checkpoints.reading import resolve
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.checkpoints.writing import write_checkpoint
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.trim import trim
from maskllm.families.registry import parameter_map
from maskllm.patterns import pack_mask, unpack_mask
from tests.families.tiny import write_tiny


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def masked(checkpoint):
    return [mapping for mapping in parameter_map(checkpoint.model_config) if mapping.linear is not None]


@pytest.fixture
def dense(tmp_path):
    write_tiny("biases", tmp_path / "hf", torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "dense")
    return resolve(tmp_path / "dense")


def write(dense, path, extra, info) -> None:
    write_checkpoint(path, dict(dense.tensors) | extra, info, hf_files_from=dense.hf_directory, description="")


def random_logits(dense, n: int, m: int) -> dict[str, LazyTensor]:
    generator = torch.Generator().manual_seed(0)
    candidates = len(list(itertools.combinations(range(m), n)))
    logits = {}
    for mapping in masked(dense):
        rows, columns = dense.tensors[mapping.megatron].shape
        # One decimal, so that some blocks have equal largest logits.
        values = torch.randn(rows, columns // m, candidates, generator=generator).mul(2).round().div(2)
        logits[f"{mapping.linear}.mask_logits"] = lazy(values)
    return logits


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_each_block_keeps_its_largest_logit(n, m, dense, tmp_path):
    logits = random_logits(dense, n, m)
    state = {"optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.mask_logits": lazy(torch.ones(2))}
    write(dense, tmp_path / "trained", logits | state, CheckpointInfo("trained", "x", f"{n}:{m}", "wanda", {"iteration": 7}))
    trim(tmp_path / "trained", tmp_path / "trimmed")
    trimmed = resolve(tmp_path / "trimmed")

    candidates = [[int(i in kept) for i in range(m)] for kept in itertools.combinations(range(m), n)]
    for mapping in masked(dense):
        values = logits[f"{mapping.linear}.mask_logits"].load().tolist()
        # list.index and max find the first of equals
        mask = torch.tensor([[bit for block in row for bit in candidates[block.index(max(block))]] for row in values]).bool()
        weight, before = trimmed.tensors[mapping.megatron].load(), dense.tensors[mapping.megatron].load()
        assert torch.equal(weight[mask].view(torch.int16), before[mask].view(torch.int16))
        assert not weight[~mask].view(torch.int16).any(), "a removed weight is not positive zero"
        assert torch.equal(unpack_mask(trimmed.tensors[f"{mapping.linear}.mask_bits"].load(), mask.shape[1]), mask)

    others = set(dense.tensors) - {mapping.megatron for mapping in masked(dense)}
    assert all(torch.equal(trimmed.tensors[key].load(), dense.tensors[key].load()) for key in others)
    assert set(trimmed.tensors) == set(dense.tensors) | {f"{mapping.linear}.mask_bits" for mapping in masked(dense)}
    assert (trimmed.info.stage, trimmed.info.pattern, trimmed.info.method) == ("trimmed", f"{n}:{m}", "wanda")


def test_a_pruned_checkpoint_keeps_its_one_shot_mask(dense, tmp_path):
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for mapping in masked(dense):
        shape = dense.tensors[mapping.megatron].shape
        masks[mapping.linear] = torch.rand(shape, generator=generator).unflatten(1, (-1, 4)).argsort(-1).lt(2).flatten(1)
    bits = {f"{linear}.mask_bits": lazy(pack_mask(mask)) for linear, mask in masks.items()}
    write(dense, tmp_path / "pruned", bits, CheckpointInfo("pruned", "x", "2:4", "magnitude"))
    trim(tmp_path / "pruned", tmp_path / "trimmed")
    trimmed = resolve(tmp_path / "trimmed")
    for linear, mask in masks.items():
        before = dense.tensors[f"{linear}.weight"].load()
        assert torch.equal(trimmed.tensors[f"{linear}.weight"].load(), torch.where(mask, before, 0))
        assert torch.equal(trimmed.tensors[f"{linear}.mask_bits"].load(), pack_mask(mask))


FC2 = "decoder.layers.1.mlp.linear_fc2"


def no_logits(logits):
    del logits[f"{FC2}.mask_logits"]


def short_logits(logits):
    logits[f"{FC2}.mask_logits"] = lazy(torch.ones(32, 12, 5))


def nan_logits(logits):
    logits[f"{FC2}.mask_logits"] = lazy(torch.full((32, 12, 6), float("nan")))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_logits, f"has no tensor {FC2}.mask_logits"),
        (short_logits, "has shape [32, 12, 5]"),
        (nan_logits, f"{FC2}: mask_logits: NaN"),
    ],
)
def test_logits_that_cannot_be_used_are_named(spoil, words, dense, tmp_path):
    logits = random_logits(dense, 2, 4)
    spoil(logits)
    write(dense, tmp_path / "trained", logits, CheckpointInfo("trained", "x", "2:4", details={"iteration": 7}))
    with pytest.raises(MaskLLMError) as error:
        trim(tmp_path / "trained", tmp_path / "trimmed")
    assert words in str(error.value)
    assert not list((tmp_path / "trimmed").glob("*")), "something was left behind"


def test_what_has_no_masks_or_is_trimmed_already_is_refused(dense, tmp_path):
    with pytest.raises(MaskLLMError, match="is a dense checkpoint; give it masks first"):
        trim(tmp_path / "dense", tmp_path / "trimmed")
    write(dense, tmp_path / "trained", random_logits(dense, 2, 4), CheckpointInfo("trained", "x", "2:4", details={"iteration": 7}))
    with pytest.raises(MaskLLMError, match="is the checkpoint that is loaded"):
        trim(tmp_path / "trained" / "release", tmp_path / "trained")
    trim(tmp_path / "trained", tmp_path / "trimmed")
    with pytest.raises(MaskLLMError, match="nothing left to trim"):
        trim(tmp_path / "trimmed", tmp_path / "again")


def test_the_numbers_are_those_of_the_trimmed_tensors(dense, tmp_path, capsys):
    write(dense, tmp_path / "trained", random_logits(dense, 1, 4), CheckpointInfo("trained", "x", "1:4", details={"iteration": 7}))
    command = ["trim", "--load", str(tmp_path / "trained"), "--output", str(tmp_path / "trimmed")]
    assert main([*command, "--json", str(tmp_path / "trim.json")]) == 0
    report = json.loads((tmp_path / "trim.json").read_text())
    tensors = {key: tensor.load() for key, tensor in resolve(tmp_path / "trimmed").tensors.items()}
    weights = [tensors[mapping.megatron] for mapping in masked(dense)]
    assert report["trimmed_from"] == "trained"
    assert report["pattern"] == "1:4"
    assert report["pruned_parameters"] == sum(weight.numel() for weight in weights) == 4 * report["blocks"]
    assert report["zeros"] == sum(int((weight == 0).sum()) for weight in weights) == 3 * report["blocks"]
    assert report["parameters"] == sum(tensor.load().numel() for tensor in dense.tensors.values())
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report["seconds"] > 0
    assert report["peak_memory_bytes"] > 0
    assert "(75.00%)" in capsys.readouterr().out
