"""What saves memory leaves what is learned alone, or changes it as documented."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from maskllm.checkpoints.finding import LATEST
from maskllm.export.trim import trim
from maskllm.ops import winner_mask
from maskllm.patterns import Pattern
from tests.training.test_layouts import logits, metrics, train
from tests.training.test_resume import learned_tensors

STEPS = 3
FULL = ("--recompute-granularity", "full", "--recompute-method")
RECOMPUTATIONS = {
    "full_uniform": (*FULL, "uniform", "--recompute-num-layers", 2),
    "selective": (
        "--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp", "masked_weight",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory, ranks, tiny_dataset, tiny_pruned) -> Path:
    """Two pipeline stages, four micro-batches a step: a stage goes forward with later ones before the first one's backward pass."""
    save = tmp_path_factory.mktemp("memory") / "plain"
    train(ranks, 2, save, tiny_dataset, tiny_pruned, "--pipeline-model-parallel-size", 2, steps=STEPS)
    return save


@pytest.mark.slow
@pytest.mark.parametrize("name", RECOMPUTATIONS)
def test_recomputed_activations_are_those_of_the_forward_pass(name, plain, ranks, tmp_path, tiny_dataset, tiny_pruned):
    save = tmp_path / name
    train(ranks, 2, save, tiny_dataset, tiny_pruned, "--pipeline-model-parallel-size", 2, *RECOMPUTATIONS[name], steps=STEPS)
    for one, other in zip(metrics(plain, "train"), metrics(save, "train"), strict=True):
        for key in ("loss", "regularizer", "mean_max_probability", "grad_norm"):
            assert other[key] == one[key], (one["iteration"], key)
    expected, found = logits(plain), logits(save)
    assert expected.keys() == found.keys()
    for key, one in expected.items():
        assert torch.equal(one, found[key]), key


@pytest.mark.slow
def test_one_draw_a_step_is_the_same_for_every_micro_batch_and_rank(ranks, tmp_path, tiny_dataset, tiny_pruned):
    """With one draw a step a batch in one micro-batch, and in two on each of two ranks, are the same sum."""
    flags = ("--mask-sample-interval", "step")
    runs = {"whole": (1, ("--micro-batch-size", 4)), "parts": (2, ("--micro-batch-size", 1))}
    for name, (processes, sizes) in runs.items():
        train(ranks, processes, tmp_path / name, tiny_dataset, tiny_pruned, *flags, *sizes, steps=STEPS)
    train(ranks, 1, tmp_path / "drawn_apart", tiny_dataset, tiny_pruned, "--micro-batch-size", 1, steps=STEPS)

    def values(name: str, key: str) -> list[float]:
        return [line[key] for line in metrics(tmp_path / name, "train")]

    for key in ("loss", "regularizer", "mean_max_probability", "grad_norm"):
        assert values("parts", key) == pytest.approx(values("whole", key), rel=1e-4), key
    assert values("drawn_apart", "loss") != pytest.approx(values("whole", "loss"), rel=1e-4)


FEW_BITS = ("--mask-logits-dtype", "bf16", "--optimizer-state-dtype", "8bit")


@pytest.mark.slow
def test_a_run_in_few_bits_is_resumed_exactly_and_under_another_layout(ranks, tmp_path, tiny_dataset, tiny_pruned):
    """Three steps, then three more in the same layout, in another one, or without a pause."""
    flags = (*FEW_BITS, "--save-interval", 3)
    whole, resumed, moved = (tmp_path / name for name in ("whole", "resumed", "moved"))
    train(ranks, 2, whole, tiny_dataset, tiny_pruned, *flags, "--tensor-model-parallel-size", 2, steps=6)
    for save, layout in ((resumed, "--tensor-model-parallel-size"), (moved, "--pipeline-model-parallel-size")):
        shutil.copytree(whole / "iter_0000003", save / "iter_0000003")
        (save / LATEST).write_text("3\n")
        train(ranks, 2, save, tiny_dataset, tiny_pruned, *flags, layout, 2, steps=6)
    expected = learned_tensors(whole)
    for key, tensor in learned_tensors(resumed).items():
        assert torch.equal(tensor, expected[key]), key
    assert expected["decoder.layers.0.mlp.linear_fc1.mask_logits"].dtype == torch.bfloat16
    assert expected["optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc1.mask_logits"].dtype == torch.float32
    for key, one in logits(moved).items():
        other = expected[key]
        assert (winner_mask(one, Pattern(2, 4)) == winner_mask(other, Pattern(2, 4))).float().mean() > 0.99, key
    assert metrics(moved, "train")[-1]["loss"] == pytest.approx(metrics(whole, "train")[-1]["loss"], rel=2e-3)
    trim(str(moved), str(tmp_path / "trimmed"))
