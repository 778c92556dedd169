"""Every parallel layout gives the same draws, losses and winners."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maskllm.ops import winner_mask
from maskllm.patterns import Pattern
from tests.training.conftest import arguments, logits, metrics
from tests.training.layout_load_worker import LAYOUTS as LOADED_LAYOUTS

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "tp2_sequence_parallel": (2, {**TP2, "sequence_parallel": True}),
    "pp2": (2, PP2),
    "dp2_distributed_optimizer": (2, {"use_distributed_optimizer": True}),
    "tp2_pp2": (4, {**TP2, **PP2}),
}
"""A layout's ranks and options. test_resume.py compares data parallelism without the distributed optimizer."""
ALONE = {"tp2": (2, TP2), "dp2": (2, {})}
"""Layouts that those above combine, for -m long."""
STEPS = 10
OPTIONS = {"steps": STEPS, "save_interval": STEPS, "eval_iters": 1, "split": "80,20,0"}


@pytest.fixture(scope="module")
def single(tmp_path_factory, ranks, tiny_dataset, tiny_pruned) -> Path:
    save = tmp_path_factory.mktemp("layouts") / "single"
    ranks(1, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned, **OPTIONS))
    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.long) for name in ALONE)])
def test_a_layout_gives_the_run_of_a_single_process(name, single, ranks, tmp_path, tiny_dataset, tiny_pruned):
    processes, layout = (LAYOUTS | ALONE)[name]
    save = tmp_path / name
    ranks(processes, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned, **OPTIONS, **layout))
    expected, found = metrics(single), metrics(save)
    assert len(expected) == len(found) == STEPS
    assert expected[-1]["changed_since_prior"] > 0.01, "the run moves too little to tell layouts apart"
    for one, other in zip(expected, found, strict=True):
        for key in ("loss", "regularizer", "mean_max_probability", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4 if key == "grad_norm" else 1e-5), (one["iteration"], key)
    for one, other in zip(metrics(single, "validation"), metrics(save, "validation"), strict=True):
        for key in ("loss_sampled", "loss_winner"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), key
    expected_logits, found_logits = logits(single), logits(save)
    assert expected_logits.keys() == found_logits.keys()
    for key, one in expected_logits.items():
        other = found_logits[key]
        close = torch.isclose(one, other, rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, key
        same = (winner_mask(one, Pattern(2, 4)) == winner_mask(other, Pattern(2, 4))).float().mean()
        assert same > 0.999, key


@pytest.mark.slow
def test_logits_load_under_every_layout_with_the_same_winners(single, ranks, tmp_path):
    """Here one process writes and four ranks read; in the test above ranks write and one process reads."""
    ranks(4, "tests.training.layout_load_worker", single, tmp_path / "found")
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(4)]
    linears = {key.removesuffix(".mask_logits") for key in logits(single)}
    assert len(linears) == 4 * 4
    for layout in LOADED_LAYOUTS:
        parts = [rank["{} {}".format(*layout)] for rank in found]
        assert set().union(*parts) == linears, layout
        different = [name for part in parts for name, same in part.items() if same != [True, True]]
        assert different == [], layout
