"""Which draw of the masks a forward pass uses: the step opens it for each micro-batch, the masked weights read it.

A draw is named by its global sample index (design: "Noise that does not depend on the layout"). It is not random state: the masks of
a sample are a function of the index, so a forward pass that is repeated for activation recomputation draws the same masks if it runs
under the same index. Under a pipeline schedule that repetition comes after later micro-batches have gone forward, so the function that
is repeated has to remember its draw: see `keep_draw`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Draw:
    """One draw of all masks."""

    sample: int
    """The global sample index: it counts micro-batches over all steps and data-parallel ranks."""
    recomputing: bool = False
    """Whether this forward pass repeats an earlier one for the backward pass."""
    kept: dict[int, torch.Tensor] = field(default_factory=dict, compare=False)
    """What a teacher's forward pass leaves for the student's: hidden states by the layer's number."""


_open: ContextVar[Draw | None] = ContextVar("maskllm_draw", default=None)


@contextlib.contextmanager
def open_draw(draw: Draw) -> Iterator[None]:
    """Forward passes inside the block draw the masks of `draw`."""
    token = _open.set(draw)
    try:
        yield
    finally:
        _open.reset(token)


def current_draw() -> Draw:
    """The draw that is open. Raises RuntimeError if none is: a forward pass with sampled masks must run inside `open_draw`."""
    draw = _open.get()
    if draw is None:
        raise RuntimeError("no draw of masks is open; run the forward pass inside of maskllm.masking.draw.open_draw")
    return draw


def draw_is_open() -> bool:
    """Whether `open_draw` is open."""
    return _open.get() is not None


_masks_off: ContextVar[bool] = ContextVar("maskllm_masks_off", default=False)


@contextlib.contextmanager
def without_masks() -> Iterator[None]:
    """Forward passes inside the block use the dense weights: those of a teacher that shares its frozen weights with the student."""
    token = _masks_off.set(True)
    try:
        yield
    finally:
        _masks_off.reset(token)


def masks_are_off() -> bool:
    """Whether `without_masks` is open."""
    return _masks_off.get()


def keep_draw(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """`function`, for activation recomputation: later calls run in the draw of the first call, marked as recomputing.

    Without an open draw (masks are not sampled) it is `function` itself.
    """
    draw = _open.get()
    if draw is None:
        return function
    calls = 0

    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        nonlocal calls
        calls += 1
        with open_draw(replace(draw, recomputing=draw.recomputing or calls > 1)):
            return function(*args, **kwargs)

    return run
