"""How Adam's moments are kept: fp32, bf16, or 8 bits an entry with a scale for every 256."""

from __future__ import annotations

import functools

import torch

QUANTIZATION_BLOCK = 256
"""Entries that share a scale (the block size of 8-bit Adam's implementations)."""


class FloatMoment:
    """A moment in fp32 or bf16; bf16 is rounded to nearest."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(numel, dtype=dtype, device=device)

    def read(self, entries: slice) -> torch.Tensor:
        """These entries, a copy in fp32."""
        return self.values[entries].to(torch.float32, copy=True)

    def write(self, entries: slice, values: torch.Tensor) -> None:
        """Keep `values` (fp32) as these entries."""
        self.values[entries] = values

    def stored(self) -> torch.Tensor:
        """What a checkpoint holds of it, [numel]."""
        return self.values

    def restore(self, values: torch.Tensor) -> None:
        """Take over what `stored` returned, here or in another layout."""
        self.values.copy_(values)


class BlockwiseMoment:
    """A moment in 8 bits an entry: block-wise dynamic quantization (Dettmers et al., arXiv 2110.02861, section 2).

    Each block of QUANTIZATION_BLOCK entries of this rank's flattened tensor is divided by its largest magnitude, and each quotient
    becomes the index of the nearest of 256 numbers between -1 (or 0, for a moment that is never negative) and 1, dense near zero. The
    second moment's positive entries never become zero, by which the step would be divided.

    A checkpoint holds the numbers the codes stand for, in fp32: quantized again in the same blocks they give the same codes; under
    another layout the blocks are others, and they are rounded once more.
    """

    def __init__(self, numel: int, device: torch.device, *, signed: bool) -> None:
        self.signed = signed
        self.codes = torch.full((numel,), zero_code(signed), dtype=torch.uint8, device=device)
        self.scales = torch.zeros(-(-numel // QUANTIZATION_BLOCK), device=device)

    def read(self, entries: slice) -> torch.Tensor:
        """These entries in fp32; the slice starts at a block and ends with one or the tensor."""
        levels = code_levels(self.signed, self.codes.device)
        return levels[self.codes[entries].int()] * self._spread(self.scales[_blocks(entries)], entries)

    def write(self, entries: slice, values: torch.Tensor) -> None:
        """Keep `values` (fp32) as these entries; the slice starts at a block and ends with one or the tensor."""
        missing = -len(values) % QUANTIZATION_BLOCK
        blocks = torch.nn.functional.pad(values, (0, missing)).view(-1, QUANTIZATION_BLOCK)
        scales = blocks.abs().amax(1)
        self.scales[_blocks(entries)] = scales
        levels = code_levels(self.signed, values.device)
        shares = values / self._spread(scales.clamp_min(torch.finfo(torch.float32).tiny), entries)
        codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2, out_int32=True)
        if not self.signed:
            codes.clamp_min_(1).mul_(values > 0)
        self.codes[entries] = codes.to(torch.uint8)

    def stored(self) -> torch.Tensor:
        """What a checkpoint holds of it: fp32 [numel], on the host."""
        whole = torch.empty(len(self.codes))
        for entries in _chunks(len(self.codes)):
            whole[entries] = self.read(entries)
        return whole

    def restore(self, values: torch.Tensor) -> None:
        """Take over what `stored` returned, here or in another layout."""
        for entries in _chunks(len(self.codes)):
            self.write(entries, values[entries].to(self.codes.device))

    def _spread(self, scales: torch.Tensor, entries: slice) -> torch.Tensor:
        return scales.repeat_interleave(QUANTIZATION_BLOCK)[: len(range(*entries.indices(len(self.codes))))]


def _blocks(entries: slice) -> slice:
    return slice(entries.start // QUANTIZATION_BLOCK, -(-entries.stop // QUANTIZATION_BLOCK))


def _chunks(numel: int, size: int = QUANTIZATION_BLOCK << 14) -> list[slice]:
    return [slice(start, min(numel, start + size)) for start in range(0, numel, size)]


@functools.cache
def code_levels(signed: bool, device: torch.device) -> torch.Tensor:
    """The 256 numbers a code can stand for, ascending, fp32 (arXiv 2110.02861, section 1.3, "dynamic tree quantization").

    A code's leading zeros choose a power of ten from 10^-6 to 1; its other bits are the middle of one of equally many equal parts of
    [0.1, 1]. Zero and one are added, and with `signed` one bit is the sign; there -1 takes the place of the negative number nearest
    to zero, so that a block's largest magnitude is always exact and quantizing again changes nothing.
    """
    bits = 7 if signed else 8
    positive = []
    for exponent in range(7):
        parts = torch.linspace(0.1, 1, (1 << (bits - 7 + exponent)) + 1, dtype=torch.float64)
        positive.append((parts[1:] + parts[:-1]) / 2 * 10.0 ** (exponent - 6))
    magnitudes = torch.cat(positive)
    if signed:
        magnitudes = torch.cat([torch.tensor([-1.0], dtype=torch.float64), -magnitudes[1:], magnitudes])
    levels = torch.cat([magnitudes, torch.tensor([0.0, 1.0], dtype=torch.float64)])
    return levels.sort().values.float().to(device)


def zero_code(signed: bool) -> int:
    """The code that stands for zero."""
    return int((code_levels(signed, torch.device("cpu")) == 0).nonzero())
