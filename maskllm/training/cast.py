"""CAST (arXiv 2509.25996): the dense weights of a run are trained toward their N:M mask by magnitude, which moves with them.

The forward pass is dense. Every few steps each block's N largest weights become its mask, and `AdamS` lets the others decay, more and
more over the run. After the run, `maskllm trim` takes the mask of the weights as they are then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from maskllm.distributed import device
from maskllm.masking.adam_s import AdamS
from maskllm.masking.parameter import MaskedParameter
from maskllm.patterns import blocks_that_differ, unpack_mask
from maskllm.training.arguments import TrainArguments


class MaskChange(NamedTuple):
    """What a look at the masks by magnitude has found, on this rank."""

    changed: torch.Tensor
    """Blocks whose mask is not the one before, int64 []."""
    blocks: int
    outside: torch.Tensor
    """The sum of |weight| outside of the mask, fp64 []."""
    total: torch.Tensor
    """The sum of all |weight|, fp64 []."""


class Cast:
    """The masks and the decay of a run, before each step."""

    def __init__(self, arguments: TrainArguments, masked: Sequence[MaskedParameter], adam: AdamS, *, has_masks: bool) -> None:
        """`has_masks`: the masks of `masked` are those of the resumed run."""
        self.arguments = arguments
        self.masked = masked
        self.adam = adam
        self.has_masks = has_masks
        self.last: MaskChange | None = None
        """What the last refresh has found; None before the second one of this process."""

    def start_step(self, iteration: int) -> None:
        """Set the decay of step `iteration`, counted from 0, and refresh the masks if it is time (algorithm 1, lines 6 to 8 and 12)."""
        self.adam.alpha = iteration / self.arguments.train_iters
        if iteration % self.arguments.mask_refresh_interval == 0:
            self.last = self.look(refresh=True)

    @torch.no_grad()
    def look(self, *, refresh: bool = False) -> MaskChange | None:
        """Compare the masks by magnitude of the weights as they are with the present ones, which `refresh` replaces by them.

        Returns None if there are no present ones yet.
        """
        changed = torch.zeros((), dtype=torch.int64, device=device())
        outside, total = torch.zeros((2,), dtype=torch.float64, device=device())
        blocks, m = 0, self.masked[0].sampler.pattern.m
        for parameter in self.masked:
            bits, columns, size = parameter.winner_bits(), parameter.shape[1], parameter.weight.abs()
            changed += blocks_that_differ(bits, parameter.bits, columns, m)
            blocks += size.numel() // m
            total += size.sum(dtype=torch.float32)
            outside += size.masked_fill_(unpack_mask(bits, columns), 0).sum(dtype=torch.float32)
            if refresh:
                parameter.refresh_mask(bits)
        had_masks, self.has_masks = self.has_masks, self.has_masks or refresh
        return MaskChange(changed, blocks, outside, total) if had_masks else None
