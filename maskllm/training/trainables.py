"""What is trained: groups of parameters, each with its learning rate and type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maskllm.masking.parameter import MaskedParameter
from maskllm.training.arguments import TrainArguments


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained alike."""

    name: str
    parameters: tuple[torch.nn.Parameter, ...]
    lr: float
    """The highest learning rate."""
    min_lr: float
    """The learning rate at the end."""
    master_dtype: torch.dtype
    """The type of the numbers that the optimizer updates."""


def parameter_groups(arguments: TrainArguments, masked: Sequence[MaskedParameter]) -> list[ParameterGroup]:
    """The groups that a run trains: the mask logits of `masked`."""
    return [
        ParameterGroup(
            "mask_logits",
            tuple(parameter.logits for parameter in masked),
            lr=arguments.lr,
            min_lr=arguments.min_lr,
            master_dtype=arguments.logits_dtype,
        )
    ]
