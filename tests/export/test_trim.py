"""Trim: winners compared with brute force, kept weights bit for bit, and nothing else in the checkpoint."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.info import CheckpointInfo
from maskllm.checkpoints.reading import Checkpoint, resolve
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.trim import trim
from maskllm.families.mapping import Mapping
from maskllm.families.registry import parameter_map
from maskllm.patterns import pack_mask, unpack_mask
from tests.checkpoints.changed import write_changed
from tests.families.tiny import write_tiny


def masked(checkpoint: Checkpoint) -> list[Mapping]:
    """The mappings of the weights that have masks."""
    return [mapping for mapping in parameter_map(checkpoint.model_config) if mapping.linear is not None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Checkpoint:
    """A tiny LLaMA with biases, bf16. Only read it."""
    path = tmp_path_factory.mktemp("biases")
    write_tiny("biases", path / "hf", torch.bfloat16)
    convert(path / "hf", path / "dense")
    return resolve(path / "dense")


def random_logits(dense: Checkpoint, n: int, m: int) -> dict[str, torch.Tensor]:
    """Logits of all masked linears by key. Rounding gives some blocks several largest logits."""
    generator = torch.Generator().manual_seed(0)
    candidates = len(list(itertools.combinations(range(m), n)))
    logits = {}
    for mapping in masked(dense):
        rows, columns = dense.tensors[mapping.megatron].shape
        values = torch.randn(rows, columns // m, candidates, generator=generator).mul(2).round().div(2)
        logits[f"{mapping.linear}.mask_logits"] = values
    return logits


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8)])
def test_each_block_keeps_its_largest_logit(n, m, dense, tmp_path):
    logits = random_logits(dense, n, m)
    state = {"optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.mask_logits": torch.ones(2)}
    info = CheckpointInfo("trained", "x", f"{n}:{m}", "wanda", {"iteration": 7})
    write_changed(dense, tmp_path / "trained", logits | state, info)
    trim(tmp_path / "trained", tmp_path / "trimmed")
    trimmed = resolve(tmp_path / "trimmed")

    candidates = [[int(i in kept) for i in range(m)] for kept in itertools.combinations(range(m), n)]
    for mapping in masked(dense):
        values = logits[f"{mapping.linear}.mask_logits"].tolist()
        # list.index finds the first of equals
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
    bits = {f"{linear}.mask_bits": pack_mask(mask) for linear, mask in masks.items()}
    write_changed(dense, tmp_path / "pruned", bits, CheckpointInfo("pruned", "x", "2:4", "magnitude"))
    report = trim(tmp_path / "pruned", tmp_path / "trimmed")
    assert report.steps_done is report.steps_planned is None
    trimmed = resolve(tmp_path / "trimmed")
    for linear, mask in masks.items():
        before = dense.tensors[f"{linear}.weight"].load()
        assert torch.equal(trimmed.tensors[f"{linear}.weight"].load(), torch.where(mask, before, 0))
        assert torch.equal(trimmed.tensors[f"{linear}.mask_bits"].load(), pack_mask(mask))


def trained(pattern: str, steps: int | None = None) -> CheckpointInfo:
    """Of a run that has done seven of `steps` steps; None for a checkpoint that does not say how many there are."""
    settings = {} if steps is None else {"settings": {"train_iters": steps}}
    return CheckpointInfo("trained", "x", pattern, details={"iteration": 7, **settings})


FC2 = "decoder.layers.1.mlp.linear_fc2"


@pytest.mark.parametrize(
    ("logits", "words"),
    [
        (None, f"has no tensor {FC2}.mask_logits"),
        (torch.ones(32, 12, 5), "has shape [32, 12, 5]"),
        (torch.full((32, 12, 6), float("nan")), f"{FC2}: mask_logits: NaN"),
    ],
    ids=["missing", "short", "nan"],
)
def test_logits_that_cannot_be_used_are_named(logits, words, dense, tmp_path):
    write_changed(dense, tmp_path / "trained", random_logits(dense, 2, 4) | {f"{FC2}.mask_logits": logits}, trained("2:4"))
    with pytest.raises(MaskLLMError) as error:
        trim(tmp_path / "trained", tmp_path / "trimmed")
    assert words in str(error.value)
    assert not list((tmp_path / "trimmed").glob("*")), "something was left behind"


def test_a_checkpoint_without_masks_or_trimmed_before_is_refused(dense, tmp_path):
    with pytest.raises(MaskLLMError, match="is a dense checkpoint; give it masks first"):
        trim(dense.path, tmp_path / "trimmed")
    write_changed(dense, tmp_path / "trained", random_logits(dense, 2, 4), trained("2:4"))
    with pytest.raises(MaskLLMError, match="is the checkpoint that is loaded"):
        trim(tmp_path / "trained" / "release", tmp_path / "trained")
    trim(tmp_path / "trained", tmp_path / "trimmed")
    with pytest.raises(MaskLLMError, match="nothing left to trim"):
        trim(tmp_path / "trimmed", tmp_path / "again")


def test_the_report_counts_the_trimmed_tensors(dense, tmp_path, capsys):
    write_changed(dense, tmp_path / "trained", random_logits(dense, 1, 4), trained("1:4"))
    command = ["trim", "--load", str(tmp_path / "trained"), "--output", str(tmp_path / "trimmed")]
    assert main([*command, "--json", str(tmp_path / "trim.json")]) == 0
    report = json.loads((tmp_path / "trim.json").read_text())
    tensors = {key: tensor.load() for key, tensor in resolve(tmp_path / "trimmed").tensors.items()}
    weights = [tensors[mapping.megatron] for mapping in masked(dense)]
    assert report["trimmed_from"] == "trained"
    assert report["pattern"] == "1:4"
    assert report["pruned_parameters"] == sum(weight.numel() for weight in weights) == 4 * report["blocks"]
    assert report["zeros"] == sum(int((weight == 0).sum()) for weight in weights) == 3 * report["blocks"]
    padding = 2 * (128 - 96) * 32  # of the embedding and of the output matrix
    assert report["parameters"] == sum(tensor.load().numel() for tensor in dense.tensors.values()) - padding
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert report["seconds"] > 0
    assert report["peak_memory_bytes"] > 0
    assert "(75.00%)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "lines"),
    [
        (7, ["the run had done 7 of 7 steps"]),
        (
            2000,
            [
                "the run had done 7 of 2,000 steps",
                "it was not at its end: its schedules had steps left, and a later checkpoint gives another model",
            ],
        ),
        (None, ["the run had done 7 steps"]),
    ],
)
def test_a_run_that_is_not_at_its_end_is_named(steps, lines, dense, tmp_path, capsys):
    write_changed(dense, tmp_path / "trained", random_logits(dense, 2, 4), trained("2:4", steps))
    command = ["trim", "--load", str(tmp_path / "trained"), "--output", str(tmp_path / "trimmed")]
    assert main([*command, "--json", str(tmp_path / "trim.json")]) == 0
    report = json.loads((tmp_path / "trim.json").read_text())
    assert (report["steps_done"], report["steps_planned"]) == (7, steps)
    assert capsys.readouterr().out.splitlines()[2:] == lines
