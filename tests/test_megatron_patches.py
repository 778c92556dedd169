"""Each patch is needed: without it a training fails, and what makes it necessary is still in the installed Megatron Core."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from megatron_patches import checkpoints, cpu, optimizer, recomputation
from tests.training.conftest import arguments

RUNS = {
    "tensor": {
        "tensor_model_parallel_size": 2, "sequence_parallel": True, "clip_grad": 1e-3, "recompute_granularity": "full",
        "recompute_method": "uniform", "recompute_num_layers": 2,
    },
    "pipeline": {"pipeline_model_parallel_size": 2, "async_save": True},
    "data": {"use_distributed_optimizer": True},
    "resumed data": {"use_distributed_optimizer": True},
    "mixed precision": {"train": "both", "params_dtype": "bf16"},
    "resumed mixed precision": {"train": "both", "params_dtype": "bf16"},
}  # fmt: skip
"""Trainings that together use all that the patches change. A resumed one continues the one before."""


def upstream_source(upstream: str) -> str:
    """The text of a module, or of the class or function in it that "module:Class.attribute" names."""
    module, _, symbol = upstream.partition(":")
    text = Path(importlib.util.find_spec(module).origin).read_text()
    node: ast.AST = ast.parse(text)
    for part in filter(None, symbol.split(".")):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return text if isinstance(node, ast.Module) else ast.get_source_segment(text, node)


@pytest.mark.parametrize(
    "patch",
    cpu.PATCHES + checkpoints.PATCHES + optimizer.PATCHES + recomputation.PATCHES,
    ids=lambda patch: patch.function.__name__,
)
def test_upstream_still_needs_the_patch(patch):
    assert patch.needed_for in upstream_source(patch.upstream), (
        f"{patch.upstream} no longer holds {patch.needed_for!r}: remove {patch.function.__module__}.{patch.function.__name__}"
    )


ANOTHER_ADAM = {"distributed_optimizer_states_on_cpu"}
"""Needed for another Adam than torch's: tests/training/test_resume.py resumes with one."""
TRAINED = {patch.function.__name__ for patch in cpu.PATCHES + optimizer.PATCHES + recomputation.PATCHES} - ANOTHER_ADAM


@pytest.mark.long
@pytest.mark.parametrize("patch", sorted(TRAINED))
def test_a_training_fails_without_the_patch(patch, ranks, tmp_path, tiny_dataset, tiny_pruned):
    """In `make test`, the tests of layouts, recomputation and saving fail if a patch is lost."""
    for name, options in RUNS.items():
        save = tmp_path / name.removeprefix("resumed ")
        values = arguments(save, tiny_dataset, tiny_pruned, 2, save_interval=1, **options)
        done = ranks(2, "tests.without_patch", patch, *values, check=False)
        if done.returncode != 0:
            assert "maskllm.train: error: rank " in done.stderr or "cannot be " in done.stderr, done.stderr[-3000:]
            return
    pytest.fail(f"all trainings succeed without {patch}: remove it")


@pytest.mark.long
def test_the_trainings_succeed_with_all_patches(ranks, tmp_path, tiny_dataset, tiny_pruned):
    for name, options in RUNS.items():
        save = tmp_path / name.removeprefix("resumed ")
        ranks(2, "tests.without_patch", "none", *arguments(save, tiny_dataset, tiny_pruned, 2, save_interval=1, **options))
