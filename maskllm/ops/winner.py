"""The winners, each block's most probable candidate, and the check that a matrix follows its pattern."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import reference
from maskllm.ops.extension import kernels
from maskllm.patterns import Pattern, unpack_mask

torch.library.define("maskllm::winner_bits", "(Tensor mask_logits, int n, int m) -> Tensor")
torch.library.define("maskllm::first_violation", "(Tensor matrix, int n, int m) -> Tensor")


def winner_bits(mask_logits: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask of each block's largest logit as bits: uint8 [out, ceil(in / 8)] in the layout of `patterns.pack_mask`.

    `mask_logits` is [out, in / M, C(M, N)], fp32, bf16 or fp16. Of equal logits the lowest candidate wins. Raises MaskLLMError if
    the shape is wrong or a logit is NaN.
    """
    (bits,) = winner_bits_of_all([mask_logits], pattern)
    return bits


def winner_bits_of_all(all_logits: Sequence[torch.Tensor], pattern: Pattern) -> list[torch.Tensor]:
    """`winner_bits` of each of `all_logits`, which are on one device. Waits for the device only once, to look for NaN."""
    for logits in all_logits:
        if logits.dim() != 3 or logits.shape[-1] != pattern.num_candidates:
            raise MaskLLMError(
                f"mask_logits {list(logits.shape)}: for pattern {pattern} wanted [out, in / {pattern.m}, {pattern.num_candidates}]"
            )
    bad = [logits.isnan().any() for logits in all_logits]
    if bad and (first := torch.stack(bad).nonzero().flatten().tolist()[:1]):
        row, block, _ = all_logits[first[0]].isnan().nonzero()[0].tolist()
        raise MaskLLMError(f"mask_logits: NaN in row {row}, block {block}; the run that trained them has diverged")
    return [torch.ops.maskllm.winner_bits(logits.detach().contiguous(), pattern.n, pattern.m) for logits in all_logits]


def winner_mask(mask_logits: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """`winner_bits` as a bool mask [out, in]."""
    return unpack_mask(winner_bits(mask_logits, pattern), mask_logits.shape[1] * pattern.m)


def check_mask(weight_or_mask: torch.Tensor, pattern: Pattern, name: str) -> None:
    """Raise MaskLLMError unless every block of `weight_or_mask` [out, in] has at most N non-zeros.

    Zeros of both signs count as zero, NaN does not. The message gives `name` and the first row and block with too many.
    """
    if weight_or_mask.dim() != 2:
        raise MaskLLMError(f"{name}: shape {list(weight_or_mask.shape)}; wanted [out, in]")
    pattern.check_divides(weight_or_mask.shape[1], name)
    matrix = weight_or_mask.detach().contiguous()
    refuse_violation(torch.ops.maskllm.first_violation(matrix, pattern.n, pattern.m), matrix, pattern, name)


def refuse_violation(first: torch.Tensor, matrix: torch.Tensor, pattern: Pattern, name: str) -> None:
    """Raise MaskLLMError for the flat index `first` of the first block with more than N non-zeros, unless it is -1."""
    index = int(first)
    if index < 0:
        return
    row, block = divmod(index, matrix.shape[1] // pattern.m)
    columns = slice(block * pattern.m, (block + 1) * pattern.m)
    found = int((matrix[row, columns] != 0).sum())
    raise MaskLLMError(
        f"{name}: row {row}, block {block} (columns {columns.start} to {columns.stop - 1}) has {found} non-zeros; "
        f"pattern {pattern} allows {pattern.n}"
    )


@torch.library.impl("maskllm::winner_bits", "CompositeExplicitAutograd")
def _winner_reference(mask_logits: torch.Tensor, n: int, m: int) -> torch.Tensor:
    return reference.winner_bits(mask_logits, Pattern(n, m))


@torch.library.impl("maskllm::first_violation", "CompositeExplicitAutograd")
def _violation_reference(matrix: torch.Tensor, n: int, m: int) -> torch.Tensor:
    return reference.first_violation(matrix, Pattern(n, m))


@torch.library.register_fake("maskllm::winner_bits")
def _winner_shapes(mask_logits: torch.Tensor, n: int, m: int) -> torch.Tensor:
    return mask_logits.new_empty((mask_logits.shape[0], (mask_logits.shape[1] * m + 7) // 8), dtype=torch.uint8)


@torch.library.register_fake("maskllm::first_violation")
def _violation_shapes(matrix: torch.Tensor, n: int, m: int) -> torch.Tensor:
    return matrix.new_empty((), dtype=torch.int64)


kernels()
