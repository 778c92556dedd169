"""Magnitude pruning: keep the largest weights."""

from __future__ import annotations

import torch

from maskllm.masking.selection import Sparsity, check_sparsity, keep_of_all, keep_of_each_block
from maskllm.patterns import Pattern


def magnitude_mask(weight: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """The mask, bool [out, in], that keeps the largest |weight| [out, in].

    `sparsity` is an N:M pattern, which keeps exactly N of every M consecutive weights of a row, or the share of weights to remove
    from the whole matrix. Of equal magnitudes the one with the lower index is kept. Raises MaskLLMError if the pattern does not
    fit.
    """
    check_sparsity(sparsity)
    if isinstance(sparsity, Pattern):
        sparsity.check_divides(weight.shape[1], "weight")
        return keep_of_each_block(weight.abs(), sparsity)
    return keep_of_all(weight.abs(), sparsity)
