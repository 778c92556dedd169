"""Which pattern a sparse matrix has, and which layout stores it in the fewest bytes: N:M for every M, or unstructured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from maskllm.errors import MaskLLMError
from maskllm.ops.sparse_linear import Layout
from maskllm.patterns import MAX_M, Pattern

_SAMPLED_ROWS = 64
_GATHERED = (Pattern(2, 4), Pattern(1, 4))
_WORTH = 1.25
"""The products of these two patterns are several times as fast as those of a bitmask, so another layout has to save this factor."""
_BROKEN = 0.01
"""The share of blocks that may have more than N non-zeros before a matrix counts as unstructured."""


@dataclass(frozen=True)
class FoundPattern:
    """The N:M pattern of a matrix."""

    pattern: Pattern
    broken: int
    """How many of its blocks have more than N non-zeros."""


def broken_blocks(kept: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Which blocks of `kept`, bool [out, in], keep more than N weights: bool [out, in / M]. M must divide in."""
    return _counts(kept, pattern.m) > pattern.n


def found_pattern(kept: torch.Tensor) -> FoundPattern | None:
    """The N:M pattern, of any M up to 64, that the zeros of a matrix follow; None if they follow none.

    N is the number of non-zeros that most blocks have; blocks without any do not count. At least half of the others have exactly N, and
    at most one in a hundred has more. Of several such patterns, the one with the smallest N / M is taken, and of those the smallest
    blocks: 2:4 rather than 4:8, 1:4 rather than 1:2. A sample of rows tells which patterns to count in full.

    Args:
        kept: bool [out, in], the places of the non-zeros.
    """
    sample = kept[:: max(1, len(kept) // _SAMPLED_ROWS)]
    likely = [pattern for m in _block_sizes(kept.shape[1], None, -1) if (pattern := _usual(sample, m)) is not None]
    for likely_pattern in sorted(likely, key=lambda pattern: (pattern.n / pattern.m, pattern.m)):
        pattern = _usual(kept, likely_pattern.m)
        if pattern == likely_pattern:
            return FoundPattern(pattern, int(broken_blocks(kept, pattern).sum()))
    return None


def _usual(kept: torch.Tensor, m: int) -> Pattern | None:
    """The pattern with blocks of `m` that `found_pattern` describes, if `kept` has one."""
    sizes = torch.bincount(_counts(kept, m).flatten().long(), minlength=m + 1)
    sizes[0] = 0
    blocks, n = int(sizes.sum()), int(sizes.argmax())
    if blocks == 0 or n == m or 2 * int(sizes[n]) < blocks or int(sizes[n + 1 :].sum()) > _BROKEN * blocks:
        return None
    return Pattern(n, m)


def _counts(kept: torch.Tensor, m: int) -> torch.Tensor:
    """How many weights each block of `m` keeps: uint8 [out, in / m]."""
    return kept.view(torch.uint8).unflatten(1, (-1, m)).sum(-1, dtype=torch.uint8)


def smallest_layout(
    kept: torch.Tensor, dtype: torch.dtype, bits: int, pattern: Pattern | None = None, group_size: int = -1
) -> Layout | None:
    """The layout with values of `bits` that takes the fewest bytes for a matrix.

    None if the matrix is not sparse: if no layout takes fewer bytes than the dense matrix, with these values and with those of its own
    `dtype`.

    Args:
        kept: bool [out, in], the places of the non-zeros.
        dtype: of the dense matrix: fp32, bf16 or fp16.
        bits: of a stored value.
        pattern: consider this pattern only.
        group_size: the columns of a scale; only patterns with blocks that divide it are considered. -1: a whole row, and without scales.

    Of layouts with the same size, the one with the smallest blocks is taken: 2:4 rather than 4:8. 2:4 and 1:4 are also taken if the
    smallest takes at least four fifths of their bytes. Rows are counted for one block size after the other, beginning with the smallest
    size that a sample of rows allows, so few of them are counted in full.
    """
    out_features, in_features = kept.shape
    count, own_bits = int(kept.sum()), 8 * dtype.itemsize
    dense = out_features * in_features * dtype.itemsize

    def nbytes(found: Pattern | None) -> int:
        return _nbytes(Layout(found, bits, group_size), out_features, in_features, count)

    def is_sparse(found: Pattern | None) -> bool:
        return max(nbytes(found), _nbytes(Layout(found, own_bits), out_features, in_features, count)) < dense

    def cost(found: Pattern | None) -> float:
        return nbytes(found) * (1 if found in _GATHERED else _WORTH)

    sample = kept[:: max(1, out_features // _SAMPLED_ROWS)]
    bounds = []
    for m in _block_sizes(in_features, pattern, group_size):
        least = _pattern(_largest_count(sample, m), m, pattern)
        if least is not None and is_sparse(least):
            bounds.append((cost(least), m))
    best, least_cost = None, math.inf
    if pattern is None and is_sparse(None):
        best, least_cost = Layout(None, bits, group_size), cost(None)
    for bound, m in sorted(bounds):
        if bound > least_cost or (bound == least_cost and best is not None and best.pattern is not None):
            break
        found = _pattern(_largest_count(kept, m), m, pattern)
        if found is not None and is_sparse(found) and cost(found) < least_cost:
            best, least_cost = Layout(found, bits, group_size), cost(found)
    return best


def _block_sizes(in_features: int, pattern: Pattern | None, group_size: int) -> Iterator[int]:
    """The block sizes that fit, smallest first. Raises MaskLLMError if a given pattern does not fit the group size."""
    if pattern is not None:
        if group_size != -1 and group_size % pattern.m:
            raise MaskLLMError(f"--group-size {group_size}: wanted a multiple of {pattern.m} for the pattern {pattern}")
        sizes = [pattern.m]
    else:
        sizes = range(2, MAX_M + 1)
    for m in sizes:
        if in_features % m == 0 and (group_size == -1 or group_size % m == 0):
            yield m


def _largest_count(kept: torch.Tensor, m: int) -> int:
    """The most non-zeros that a block of `m` columns has."""
    if kept.numel() == 0:
        return 0
    return int(_counts(kept, m).max())


def _pattern(n: int, m: int, wanted: Pattern | None) -> Pattern | None:
    """The pattern with `n` of `m`; None if it keeps all, or more than the `wanted` one does."""
    if wanted is not None:
        return wanted if n <= wanted.n else None
    return Pattern(max(n, 1), m) if n < m else None


def _nbytes(layout: Layout, out_features: int, in_features: int, kept: int) -> int:
    dtypes = layout.dtypes(torch.float32 if layout.bits == 32 else torch.bfloat16)
    shapes = layout.shapes(out_features, in_features, kept)
    return sum(math.prod(shape) * dtypes[key].itemsize for key, shape in shapes.items())
