"""The layout changes nothing: same draws, same losses, same winners."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maskllm.checkpoints.reading import resolve
from maskllm.ops import winner_mask
from maskllm.patterns import Pattern
from tests.training.layout_load_worker import LAYOUTS as LOADED_LAYOUTS

LAYOUTS = {
    "tp2": (2, ["--tensor-model-parallel-size", 2]),
    "tp2_sequence_parallel": (2, ["--tensor-model-parallel-size", 2, "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", 2]),
    "dp2": (2, []),
    "dp2_distributed_optimizer": (2, ["--use-distributed-optimizer"]),
    "tp2_pp2": (4, ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]),
}
STEPS = 10


def train(ranks: Callable, processes: int, save: Path, dataset: str, start: Path, *extra: object, steps: int = STEPS) -> None:
    """Ten steps at a rate that moves some winners, logging each."""
    ranks(
        processes, "maskllm.train", "--data-path", dataset, "--pretrained-checkpoint", start, "--save", save, "--load", save,
        "--train-iters", steps, "--global-batch-size", 4, "--seq-length", 32, "--lr", 0.01, "--params-dtype", "fp32",
        "--log-interval", 1, "--eval-iters", 2, "--eval-interval", 5, "--split", "80,20,0", *extra,
    )  # fmt: skip


def metrics(save: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def logits(save: Path) -> dict[str, torch.Tensor]:
    tensors = resolve(save).tensors
    return {key: tensors[key].load() for key in tensors if key.endswith(".mask_logits") and not key.startswith("optimizer")}


@pytest.fixture(scope="module")
def single(tmp_path_factory, ranks, tiny_dataset, tiny_pruned) -> Path:
    save = tmp_path_factory.mktemp("layouts") / "single"
    train(ranks, 1, save, tiny_dataset, tiny_pruned)
    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_same_run(name, single, ranks, tmp_path, tiny_dataset, tiny_pruned):
    processes, flags = LAYOUTS[name]
    train(ranks, processes, tmp_path / name, tiny_dataset, tiny_pruned, *flags)
    expected, found = metrics(single, "train"), metrics(tmp_path / name, "train")
    assert len(expected) == len(found) == STEPS
    assert expected[-1]["changed_since_prior"] > 0.01, "the run moves too little to tell layouts apart"
    for one, other in zip(expected, found, strict=True):
        for key in ("loss", "regularizer", "mean_max_probability", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4 if key == "grad_norm" else 1e-5), (one["iteration"], key)
    for one, other in zip(metrics(single, "validation"), metrics(tmp_path / name, "validation"), strict=True):
        for key in ("loss_sampled", "loss_winner"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
    expected_logits, found_logits = logits(single), logits(tmp_path / name)
    assert expected_logits.keys() == found_logits.keys()
    for key, one in expected_logits.items():
        other = found_logits[key]
        close = torch.isclose(one, other, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, key
        same = (winner_mask(one, Pattern(2, 4)) == winner_mask(other, Pattern(2, 4))).float().mean()
        assert same > 0.999, key


@pytest.mark.slow
def test_logits_load_under_every_layout_with_the_same_winners(single, ranks, tmp_path):
    """Beside this, every layout above writes what one process reads."""
    ranks(4, "tests.training.layout_load_worker", single, tmp_path / "found")
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(4)]
    linears = {key.removesuffix(".mask_logits") for key in logits(single)}
    assert len(linears) == 4 * 4
    for layout in LOADED_LAYOUTS:
        parts = [rank["{} {}".format(*layout)] for rank in found]
        assert set().union(*parts) == linears, layout
        different = [name for part in parts for name, same in part.items() if same != [True, True]]
        assert different == [], layout
