"""How masks are drawn: the settings that all masked weights of a process share.

Which draw it is, the sample index, is not among them: it belongs to a micro-batch (`maskllm.masking.draw`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maskllm.patterns import Pattern

VALIDATION_SAMPLES = 1 << 62
"""Sample indices from here on belong to validation, so a validation never changes what training draws."""


@dataclass
class MaskSampler:
    """One object a process: the step sets it, every masked weight reads it."""

    pattern: Pattern
    seed: int = 1234
    hard: bool = False
    scale: float = 1.0
    """kappa"""
    temperature: float = 1.0
    """tau"""
    weight_reg: float = 0.0
    """Weight of -||W * m||^2 in this micro-batch's loss: lambda divided by the step's micro-batches."""
    recompute_masked_weight: bool = False
    """Whether the backward pass draws the masked weight again instead of keeping it from the forward pass."""
    stats: torch.Tensor | None = None
    """fp32 [2]. While it is set, every draw adds the sum of squares of its masked weight and the sum of its maximum probabilities."""
