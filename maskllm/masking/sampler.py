"""The state all masked layers of a process share: which kind of masks the next forward pass uses, and with what settings.

Which draw it is, the sample index, is not among them: it belongs to a micro-batch (`maskllm.masking.draw`).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from maskllm.patterns import Pattern

VALIDATION_SAMPLES = 1 << 62
"""Sample indices from here on belong to validation, so that looking at the model never changes what training draws."""


class MaskMode(enum.Enum):
    """Where a layer with learned logits takes its mask from."""

    SAMPLE = "sample"
    """A Gumbel-Softmax draw."""
    WINNER = "winner"
    """The arg-max candidate of every block, as after training."""


@dataclass
class MaskSampler:
    """One a process; set by the step loop, read by every masked layer's forward pass."""

    pattern: Pattern
    seed: int = 1234
    hard: bool = False
    mode: MaskMode = MaskMode.SAMPLE
    scale: float = 1.0
    temperature: float = 1.0
    weight_reg: float = 0.0
    """Weight of -||W * m||^2 in this micro-batch's loss, divided by the micro-batches of a step."""
    recompute_masked_weight: bool = False
    """Whether layers draw their masked weight again in the backward pass instead of keeping it from the forward pass."""
    stats: torch.Tensor | None = None
    """fp32 [2], added to by every draw while set: sum of squares of masked weights, sum of maximum probabilities."""
