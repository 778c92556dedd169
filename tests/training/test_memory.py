"""Options that save memory change nothing that is learned, or only as documented."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from maskllm.checkpoints.finding import LATEST
from maskllm.export.trim import trim
from maskllm.ops import winner_mask
from maskllm.patterns import Pattern
from tests.training.conftest import arguments, learned_tensors, logits, metrics

OPTIONS = {"steps": 3, "save_interval": 3}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
RECOMPUTATIONS = {
    "full_uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "masked_weight"]},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, ranks, tiny_dataset, tiny_pruned) -> Path:
    """Two pipeline stages and four micro-batches a step: the first stage runs two forward passes before the first backward pass."""
    save = tmp_path_factory.mktemp("memory") / "plain"
    ranks(2, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned, **OPTIONS, **PP2))
    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", RECOMPUTATIONS)
def test_recomputation_changes_nothing(name, plain, ranks, tmp_path, tiny_dataset, tiny_pruned):
    save = tmp_path / name
    ranks(2, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned, **OPTIONS, **PP2, **RECOMPUTATIONS[name]))
    for one, other in zip(metrics(plain), metrics(save), strict=True):
        for key in ("loss", "regularizer", "mean_max_probability", "grad_norm"):
            assert other[key] == one[key], (one["iteration"], key)
    expected, found = logits(plain), logits(save)
    assert expected.keys() == found.keys()
    for key, one in expected.items():
        assert torch.equal(one, found[key]), key


@pytest.mark.slow
def test_one_draw_a_step_is_the_same_for_every_micro_batch_and_rank(ranks, tmp_path, tiny_dataset, tiny_pruned):
    """With one draw a step, a batch gives the same sums in one micro-batch as in two on each of two ranks."""
    runs = {
        "whole": (1, {"mask_sample_interval": "step", "micro_batch_size": 4}),
        "parts": (2, {"mask_sample_interval": "step"}),
        "drawn_apart": (1, {}),
    }
    for name, (processes, options) in runs.items():
        ranks(processes, "maskllm.train", *arguments(tmp_path / name, tiny_dataset, tiny_pruned, **OPTIONS, **options))

    def values(name: str, key: str) -> list[float]:
        return [line[key] for line in metrics(tmp_path / name)]

    for key in ("loss", "regularizer", "mean_max_probability", "grad_norm"):
        assert values("parts", key) == pytest.approx(values("whole", key), rel=1e-4), key
    assert values("drawn_apart", "loss") != pytest.approx(values("whole", "loss"), rel=1e-4)


@pytest.mark.slow
def test_a_low_precision_run_is_resumed_exactly_and_under_another_layout(ranks, tmp_path, tiny_dataset, tiny_pruned):
    """Two steps, then two more without a pause, after a resume, and after a resume under another layout."""

    def train(save: Path, layout: dict[str, int]) -> None:
        low_precision = {"mask_logits_dtype": "bf16", "optimizer_state_dtype": "8bit"}
        ranks(2, "maskllm.train", *arguments(save, tiny_dataset, tiny_pruned, steps=4, **low_precision, **layout))

    whole, resumed, moved = (tmp_path / name for name in ("whole", "resumed", "moved"))
    train(whole, TP2)
    for save, layout in ((resumed, TP2), (moved, PP2)):
        shutil.copytree(whole / "iter_0000002", save / "iter_0000002")
        (save / LATEST).write_text("2\n")
        train(save, layout)
    expected = learned_tensors(whole)
    for key, tensor in learned_tensors(resumed).items():
        assert torch.equal(tensor, expected[key]), key
    assert expected["decoder.layers.0.mlp.linear_fc1.mask_logits"].dtype == torch.bfloat16
    assert expected["optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.mask_logits"].dtype == torch.float32
    for key, one in logits(moved).items():
        other = expected[key]
        assert (winner_mask(one, Pattern(2, 4)) == winner_mask(other, Pattern(2, 4))).float().mean() > 0.99, key
    assert metrics(moved)[-1]["loss"] == pytest.approx(metrics(whole)[-1]["loss"], rel=2e-3)
    trim(str(moved), str(tmp_path / "trimmed"))
