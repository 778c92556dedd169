"""The mask training ends with: each block's most probable candidate."""

from __future__ import annotations

import torch

from maskllm.errors import MaskLLMError
from maskllm.ops.reference import first_argmax
from maskllm.patterns import Pattern, pack_mask


def _check_logits(mask_logits: torch.Tensor, pattern: Pattern) -> None:
    if mask_logits.dim() != 3 or mask_logits.shape[-1] != pattern.num_candidates:
        raise MaskLLMError(
            f"mask_logits {list(mask_logits.shape)}: for pattern {pattern} wanted [out, in / {pattern.m}, {pattern.num_candidates}]"
        )
    bad = mask_logits.isnan()
    if bad.any():
        row, block, _ = bad.nonzero()[0].tolist()
        raise MaskLLMError(f"mask_logits: NaN in row {row}, block {block}; the run that trained them has diverged")


def winner_mask(mask_logits: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask of each block's largest logit, bool [out, in], for `mask_logits` [out, in / M, C(M, N)].

    Of equal logits the lowest candidate wins. Raises MaskLLMError where the shape is another or a logit is NaN.
    """
    _check_logits(mask_logits, pattern)
    candidates = pattern.candidates(dtype=torch.bool, device=mask_logits.device)
    return candidates[first_argmax(mask_logits)].flatten(1)


def winner_bits(mask_logits: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """`winner_mask` as bits: uint8 [out, ceil(in / 8)], as `patterns.pack_mask` lays them out."""
    return pack_mask(winner_mask(mask_logits, pattern))


def check_mask(weight_or_mask: torch.Tensor, pattern: Pattern, name: str) -> None:
    """Raise MaskLLMError unless every block of `weight_or_mask` [out, in] has at most N non-zeros.

    Zeros of either sign are zeros, NaN is not. The message names `name` and the first offending row and block.
    """
    if weight_or_mask.dim() != 2:
        raise MaskLLMError(f"{name}: shape {list(weight_or_mask.shape)}; wanted [out, in]")
    pattern.check_divides(weight_or_mask.shape[1], name)
    nonzeros = (weight_or_mask != 0).unflatten(1, (-1, pattern.m)).sum(-1)
    bad = nonzeros > pattern.n
    if bad.any():
        row, block = bad.nonzero()[0].tolist()
        raise MaskLLMError(
            f"{name}: row {row}, block {block} (columns {block * pattern.m} to {block * pattern.m + pattern.m - 1}) has "
            f"{nonzeros[row, block].item()} non-zeros; pattern {pattern} allows {pattern.n}"
        )
