"""Patches of Megatron Core's activation recomputation, on any device."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from maskllm.masking.draw import keep_draw
from megatron_patches.patch import Patch, upstream_object

_CHECKPOINT = "megatron.core.tensor_parallel.random:checkpoint"


def recomputation_keeps_the_draw() -> None:
    """`checkpoint` runs a function once without and later once with gradients, when other micro-batches have gone forward in between.

    The masks of both passes must be those of the same sample, so the function remembers its draw.
    """
    checkpoint = upstream_object(_CHECKPOINT)

    @functools.wraps(checkpoint)
    def checkpoint_in_draw(function: Callable, distribute_saved_activations: bool, *args: Any) -> Any:
        return checkpoint(keep_draw(function), distribute_saved_activations, *args)

    for module in ("megatron.core.tensor_parallel.random", "megatron.core.tensor_parallel"):
        importlib.import_module(module).checkpoint = checkpoint_in_draw


PATCHES = [
    Patch(recomputation_keeps_the_draw, _CHECKPOINT, "CheckpointFunction.apply(function, distribute_saved_activations, *args)")
]
