"""Patches of Megatron Core's optimizers, on any device."""

from __future__ import annotations

import functools
from typing import Any

from megatron_patches.patch import Patch, upstream_object

_MASTERS = "fp32_from_fp16_params"
_OPTIMIZER = "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params"


def mixed_precision_states_are_found_by_all_parameters() -> None:
    """Number the parameters in a checkpoint as the optimizer does: over all groups, also those in fp32.

    Upstream looks for the places of the optimizer's states among the 16-bit parameters alone. Beside fp32 mask logits, it would take
    the places of other parameters. Nor can it load the masters of a group that has none, an empty list. Each group here has parameters
    of one dtype.
    """
    optimizer = upstream_object(_OPTIMIZER)
    upstream, upstream_load = optimizer.sharded_state_dict, optimizer.load_state_dict

    @functools.wraps(upstream)
    def sharded_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        float16_groups = self.float16_groups
        self.float16_groups = [float16 + fp32 for float16, fp32 in zip(float16_groups, self.fp32_from_fp32_groups, strict=True)]
        try:
            state = upstream(self, *args, **kwargs)
        finally:
            self.float16_groups = float16_groups
        return state | {_MASTERS: [masters for masters in state[_MASTERS] if masters]}

    @functools.wraps(upstream_load)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        stored = iter(state_dict[_MASTERS])
        masters = [next(stored) if group else [] for group in self.fp32_from_float16_groups]
        upstream_load(self, state_dict | {_MASTERS: masters})

    optimizer.sharded_state_dict, optimizer.load_state_dict = sharded_state_dict, load_state_dict


PATCHES = [
    Patch(
        mixed_precision_states_are_found_by_all_parameters,
        f"{_OPTIMIZER}.sharded_state_dict",
        "chain.from_iterable(g for g in self.float16_groups)",
    )
]
