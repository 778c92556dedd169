"""Wanda: magnitude times the norm of the input (arXiv 2306.11695, section 3)."""

from __future__ import annotations

import torch

from maskllm.masking.selection import Sparsity, check_sparsity, keep_of_each_block, keep_of_each_row
from maskllm.patterns import Pattern


def wanda_mask(weight: torch.Tensor, input_squares: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """The mask, bool [out, in], that keeps the largest scores |W_ij| * ||X_j||_2 of each block of M, or of each output row.

    `weight` is [out, in]. `input_squares` [in] is the sum of each input's squares over all calibration tokens; a common factor has
    no effect. `sparsity` is an N:M pattern, or the share of weights to remove from every output row (section 3, "comparison
    group"). Raises MaskLLMError if the pattern does not fit.
    """
    check_sparsity(sparsity)
    scores = weight.abs().float() * input_squares.sqrt().float()
    if isinstance(sparsity, Pattern):
        sparsity.check_divides(weight.shape[1], "weight")
        return keep_of_each_block(scores, sparsity)
    return keep_of_each_row(scores, sparsity)
