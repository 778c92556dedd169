"""The PyTorch reference of the operators of `maskllm.ops.sparse_linear`, and the parts of their stored form.

It runs if no kernel was built, and the tests compare the kernels with it. Every function takes a layout as its four numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from maskllm.errors import MaskLLMError
from maskllm.patterns import Pattern

LARGEST = {8: 127, 4: 7}
"""The largest integer of 8 and 4 bits; the smallest is its negative."""

FINE, BAD_ROW_STARTS, BAD_PLACES, BAD_COUNT, BAD_PADDING, BAD_SCALE, BAD_VALUE = range(7)
"""What `first_fault` finds. `Fault` in csrc/include/sparse_matrix.h has the same numbers."""


class Numbers(NamedTuple):
    """A layout as the operators take it. n = m = 0 means unstructured."""

    n: int
    m: int
    bits: int
    group_size: int


def bits_a_block(numbers: Numbers) -> tuple[int, int]:
    """The bits of `places` for one block, and its columns: (4, 4) for 2:4, (2, 4) for 1:4, (1, 1) for a bitmask."""
    return {(2, 4): (4, 4), (1, 4): (2, 4)}.get(numbers[:2], (1, 1))


def place_bytes(in_features: int, numbers: Numbers) -> int:
    """The bytes of `places` in a row."""
    bits, columns = bits_a_block(numbers)
    return -(-in_features // columns * bits // 8)


def value_elements(kept: int, bits: int) -> int:
    """The elements that store `kept` values in a row."""
    return -(-kept // 2) if bits == 4 else kept


def groups(in_features: int, group_size: int) -> int:
    """The number of scales in a row."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def unpack_bits(places: torch.Tensor, width: int) -> torch.Tensor:
    """The fields of `width` bits in each row, the lowest first: uint8 [out, bytes] to [out, bytes * 8 / width]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=places.device)
    return (places.unsqueeze(-1) >> shifts & (1 << width) - 1).flatten(1)


def pack_bits(fields: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of `unpack_bits`, padded to whole bytes."""
    a_byte = 8 // width
    fields = torch.nn.functional.pad(fields.to(torch.uint8), (0, -fields.shape[1] % a_byte))
    packed = fields[:, 0::a_byte].clone()
    for place in range(1, a_byte):
        packed |= fields[:, place::a_byte] << place * width
    return packed


def unpack_nibbles(packed: torch.Tensor, kept: int) -> torch.Tensor:
    """The `kept` numbers of 4 bits in the last dimension, as int8."""
    nibbles = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :kept]
    return (nibbles ^ 8).to(torch.int8) - 8


def pack_nibbles(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_nibbles`: int8 to uint8, half as long."""
    nibbles = torch.nn.functional.pad(values, (0, values.shape[-1] % 2)).view(torch.uint8) & 15
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def kept(places: torch.Tensor, in_features: int, numbers: Numbers) -> torch.Tensor:
    """The mask, bool [out, in], that `places` describe."""
    bits, columns = bits_a_block(numbers)
    fields = unpack_bits(places, bits)[:, : in_features // columns]
    if columns == 1:
        return fields.bool()
    column = torch.arange(columns, device=places.device)
    fields = fields.unsqueeze(-1)
    mask = column == (fields & 3)
    if bits == 4:
        mask = mask | (column == fields >> 2)
    return mask.flatten(1)


def pack_places(mask: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """The inverse of `kept`, for a mask with exactly N kept in a block."""
    bits, columns = bits_a_block(numbers)
    if columns == 1:
        return pack_bits(mask, 1)
    n = numbers.n
    column = torch.arange(columns, dtype=torch.uint8, device=mask.device).expand(*mask.shape[:1], mask.shape[1] // columns, columns)
    chosen = column[mask.view_as(column)].view(len(mask), -1, n)
    return pack_bits(chosen[..., 0] | chosen[..., -1] << 2 if n == 2 else chosen[..., 0], bits)


def choose(weight: torch.Tensor, pattern: Pattern | None, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """The places that are stored, bool [out, in]: exactly N a block; unstructured, those of the mask, else all but positive zeros.

    Raises MaskLLMError if a block has more non-zeros.
    """
    nonzero = weight != 0
    negative_zero = ~nonzero & torch.signbit(weight)
    if mask is not None:
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise MaskLLMError(f"{name}: its mask is {mask.dtype} {list(mask.shape)}; wanted bool {list(weight.shape)}")
        outside = (nonzero & ~mask).nonzero()
        if len(outside):
            row, column = outside[0].tolist()
            raise MaskLLMError(f"{name}: row {row}, column {column} is not zero, and its mask does not keep it")
        nonzero, negative_zero = mask, negative_zero & ~mask
    if pattern is None:
        return nonzero | negative_zero if mask is None else mask
    shape = (len(weight), -1, pattern.m)
    count = nonzero.view(shape).sum(-1)
    crowded = (count > pattern.n).nonzero()
    if len(crowded):
        row, block = crowded[0].tolist()
        found = "kept places" if mask is not None else "non-zeros"
        raise MaskLLMError(
            f"{name}: row {row}, block {block} (columns {block * pattern.m} to {(block + 1) * pattern.m - 1}) has "
            f"{int(count[row, block])} {found}; pattern {pattern} allows {pattern.n}"
        )
    chosen = nonzero.clone().view(shape)
    short = count < pattern.n
    if short.any():
        order = torch.where(nonzero.view(shape)[short], 0, torch.where(negative_zero.view(shape)[short], 1, 2)) * pattern.m
        first = (order + torch.arange(pattern.m, device=weight.device)).argsort(-1)[:, : pattern.n]
        chosen[short] = torch.zeros_like(chosen[short]).scatter_(-1, first, True)
    return chosen.view_as(weight)


def each_column(scales: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor:
    """The scale of each column, [out, in]."""
    if scales.shape[1] == 1:
        return scales.expand(-1, in_features)
    return scales.repeat_interleave(group_size, 1)[:, :in_features]


def scales_of(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The scale of each group, fp32 [out, groups], with which its largest value becomes 127 or 7; 1 for a group of zeros."""
    count = groups(weight.shape[1], group_size)
    size = weight.shape[1] if count == 1 else group_size
    padded = torch.nn.functional.pad(weight.float().abs(), (0, count * size - weight.shape[1]))
    scales = padded.view(len(weight), count, size).amax(-1) / LARGEST[bits]
    return torch.where(scales > 0, scales, 1.0)


def quantize(weight: torch.Tensor, scales: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """`weight / scale`, rounded to the nearest, ties to even: int8 [out, in]."""
    scaled = weight.float() / each_column(scales, weight.shape[1], group_size)
    return scaled.round().clamp_(-LARGEST[bits], LARGEST[bits]).to(torch.int8)


def expand(
    values: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor | None,
    row_starts: torch.Tensor | None,
    in_features: int,
    numbers: Numbers,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The dense matrix [out, in]. A weight of integers is `value * scale` in fp32, then rounded to `dtype`."""
    mask = kept(places, in_features, numbers)
    if numbers.bits == 4:
        count = values.numel() * 2 if row_starts is not None else in_features // numbers.m * numbers.n
        values = unpack_nibbles(values, count)
    if row_starts is not None:
        values = values[: int(row_starts[-1])]
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)
    if scales is not None:
        dense = dense.float() * each_column(scales, in_features, numbers.group_size)
    return dense.to(dtype)


def _first(bad: torch.Tensor) -> list[int] | None:
    """Row and index of the first true element of [rows, n]."""
    where = bad.nonzero()
    return where[0].tolist() if len(where) else None


def first_fault(
    values: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor | None,
    row_starts: torch.Tensor | None,
    in_features: int,
    numbers: Numbers,
) -> tuple[int, int, int]:
    """What is wrong with a stored matrix of the right shapes, its row, and its block, group or value; (FINE, 0, 0) if nothing is.

    Faults are looked for in the order of their numbers.
    """
    n, m, bits, _ = numbers
    width, columns = bits_a_block(numbers)
    fields = unpack_bits(places, width)
    inside, after = fields[:, : in_features // columns], fields[:, in_features // columns :]
    checks = []
    if row_starts is not None:
        bad = row_starts[1:] < row_starts[:-1]
        bad[:1] |= row_starts[0] != 0
        bad[-1:] |= value_elements(int(row_starts[-1]), bits) != values.numel()
        checks.append((BAD_ROW_STARTS, bad.unsqueeze(1)))
    if width == 4:
        checks.append((BAD_PLACES, (inside & 3) >= (inside >> 2)))
    elif width == 1 and row_starts is not None:
        checks.append((BAD_COUNT, (inside.sum(1) != row_starts.diff()).unsqueeze(1)))
    elif width == 1:
        checks.append((BAD_COUNT, inside.unflatten(1, (-1, m)).sum(-1) != n))
    checks.append((BAD_PADDING, after != 0))
    if scales is not None:
        checks.append((BAD_SCALE, ~(scales > 0) | scales.isinf()))
    if bits == 8:
        checks.append((BAD_VALUE, values.view(1, -1) == -128 if row_starts is not None else values == -128))
    elif bits == 4:
        numbers_of_4 = unpack_nibbles(values, 2 * values.shape[-1])
        checks.append((BAD_VALUE, (numbers_of_4.view(1, -1) if row_starts is not None else numbers_of_4) == -8))
    for fault, bad in checks:
        place = _first(bad)
        if place is not None:
            return fault, place[0], 0 if fault == BAD_PADDING else place[1]
    return FINE, 0, 0
