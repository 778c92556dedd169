"""Options that save memory change nothing that is learned, or only as documented."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from maskllm.checkpoints.finding import LATEST
from maskllm.export.trim import trim
from maskllm.ops import winner_mask
from maskllm.patterns import Pattern
from tests.training.conftest import arguments, learned_tensors, logits, metrics, tensors

OPTIONS = {"steps": 3, "save_interval": 3}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
RECOMPUTATIONS = {
    "full_uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "masked_weight"]},
}


TEACHER = {"kl_loss_coeff": 0.5, "kl_temperature": 2.0, "squarehead_loss_coeff": 0.1}
TRAINED = {
    "masks": {},
    "masks, teacher": TEACHER,
    "weights, teacher": TEACHER | {"train": "weights", "weights_lr": 0.003},
    "both, teacher": TEACHER | {"train": "both", "weights_lr": 0.003},
    "cast": {"train": "weights", "weights_optimizer": "cast", "mask_refresh_interval": 2, "weights_lr": 0.003},
}
LONG = ("masks, teacher", "weights, teacher", "cast")
"""For -m long: with both and a teacher, masks are drawn again for the backward pass, weights move and the teacher is another model."""


@pytest.fixture(scope="module")
def train_stages(tmp_path_factory, ranks, tiny_dataset, tiny_dense, tiny_pruned) -> Callable[..., Path]:
    """Trains in two pipeline stages, as `recomputation` says; returns where.

    With four micro-batches a step, the first stage runs two forward passes before the first backward pass.
    """

    @functools.cache
    def train(trained: str, recomputation: str | None) -> Path:
        save = tmp_path_factory.mktemp("memory") / "run"
        start = tiny_dense if trained == "cast" else tiny_pruned
        options = OPTIONS | PP2 | TRAINED[trained] | RECOMPUTATIONS.get(recomputation, {})
        ranks(2, "maskllm.train", *arguments(save, tiny_dataset, start, **options))
        return save

    return train


@pytest.mark.slow
@pytest.mark.parametrize("recomputation", RECOMPUTATIONS)
@pytest.mark.parametrize("trained", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in TRAINED])
def test_recomputation_changes_nothing(trained, recomputation, train_stages):
    plain, save = train_stages(trained, None), train_stages(trained, recomputation)
    wanted = {"loss", "grad_norm", *(["kl", "squarehead"] if TEACHER.items() <= TRAINED[trained].items() else [])}
    for one, other in zip(metrics(plain), metrics(save), strict=True):
        assert wanted <= one.keys()
        for key in one.keys() - {"tokens_per_second", "peak_memory_gib"}:
            assert other[key] == one[key], (one["iteration"], key)
    expected, found = tensors(plain), tensors(save)
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


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
