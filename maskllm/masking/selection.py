"""Select the largest scores: N of each M, or a share of each row or of the whole matrix.

The selection is deterministic: of equal scores the one with the lower index is kept.
"""

from __future__ import annotations

import torch

from maskllm.errors import MaskLLMError
from maskllm.patterns import Pattern

Sparsity = Pattern | float
"""The target of a pruning method: an N:M pattern, or the share of weights to remove (unstructured)."""


def check_sparsity(sparsity: Sparsity) -> None:
    """Raise MaskLLMError if an unstructured sparsity is not strictly between 0 and 1."""
    if not isinstance(sparsity, Pattern) and not 0 < sparsity < 1:
        raise MaskLLMError(f"sparsity {sparsity}: wanted the share of weights to remove, between 0 and 1, for example 0.5")


def check_keeps(mask: torch.Tensor, pattern: Pattern, where: str) -> None:
    """Raise MaskLLMError naming the first block of `mask`, bool [out, in], that does not keep exactly N of M; `where` names the mask."""
    pattern.check_divides(mask.shape[1], where)
    kept = mask.unflatten(1, (-1, pattern.m)).sum(-1)
    if (kept != pattern.n).any():
        row, block = (kept != pattern.n).nonzero()[0].tolist()
        raise MaskLLMError(
            f"{where}: output {row}, block {block} (inputs {block * pattern.m} to {(block + 1) * pattern.m - 1}) keeps "
            f"{kept[row, block].item()} weights; --pattern {pattern} wants {pattern.n}"
        )


def keep_of_each_block(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask, bool [..., in], that keeps the N largest of every M consecutive `scores` [..., in]; `in` is a multiple of M."""
    blocks = scores.unflatten(-1, (-1, pattern.m))
    return _keep_largest(blocks, pattern.n).flatten(-2)


def keep_of_each_row(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The mask, bool [..., in], that removes the floor(in * sparsity) smallest `scores` of each row."""
    columns = scores.shape[-1]
    return _keep_largest(scores, columns - int(columns * sparsity))


def keep_of_all(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The mask, bool of `scores`' shape, that removes the floor(numel * sparsity) smallest of all `scores`."""
    return keep_of_each_row(scores.flatten(), sparsity).view_as(scores)


def _keep_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(-1, order[..., :count], True)
