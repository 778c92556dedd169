"""Storage of Adam's moments: fp32, bf16, or 8 bits per entry with one scale for every 256 entries."""

from __future__ import annotations

import functools

import torch

_CHUNK = 1 << 22
"""Entries that are converted at once, a whole number of quantization blocks."""
QUANTIZATION_BLOCK = 256
"""How many entries share a scale (the block size in implementations of 8-bit Adam)."""


class FloatMoment:
    """A moment in fp32 or bf16. Values stored in bf16 are rounded to nearest."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(numel, dtype=dtype, device=device)

    def read(self, entries: slice) -> torch.Tensor:
        """Return a copy of these entries in fp32."""
        return self.values[entries].to(torch.float32, copy=True)

    def write(self, entries: slice, values: torch.Tensor) -> None:
        """Store `values` (fp32) as these entries."""
        self.values[entries] = values

    def stored(self) -> torch.Tensor:
        """Return what a checkpoint holds of this moment: [numel], in the moment's dtype and on its device."""
        return self.values

    def restore(self, values: torch.Tensor) -> None:
        """Load `values` [numel], which `stored` returned under this parallel layout or another one."""
        self.values.copy_(values)


class BlockwiseMoment:
    """A moment in 8 bits per entry: block-wise dynamic quantization (Dettmers et al., arXiv 2110.02861, section 2).

    This rank's flattened tensor is cut into blocks of QUANTIZATION_BLOCK entries. Each block is divided by its largest magnitude.
    Each quotient is stored as the index of the nearest of 256 numbers between -1 (or 0, for a moment that is never negative) and 1.
    These numbers are dense near zero. A positive entry of the second moment never becomes zero, because the step divides by its
    square root.

    A checkpoint holds the numbers that the codes stand for, in fp32. Quantizing them again in the same blocks gives the same codes.
    Another parallel layout has other blocks, so there the numbers are rounded once more.
    """

    def __init__(self, numel: int, device: torch.device, *, signed: bool) -> None:
        self.signed = signed
        self.codes = torch.full((numel,), zero_code(signed), dtype=torch.uint8, device=device)
        self.scales = torch.zeros(-(-numel // QUANTIZATION_BLOCK), device=device)

    def read(self, entries: slice) -> torch.Tensor:
        """Return these entries in fp32. The slice must start at a block's start and end at a block's end or the tensor's end."""
        levels = code_levels(self.signed, self.codes.device)
        return levels[self.codes[entries].int()] * self._spread(self.scales[_blocks(entries)], entries)

    def write(self, entries: slice, values: torch.Tensor) -> None:
        """Quantize and store `values` (fp32) as these entries. The slice has the limits that `read` requires."""
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
        """Return what a checkpoint holds of this moment: fp32 [numel], on the CPU."""
        whole = torch.empty(len(self.codes))
        for entries in _chunks(len(self.codes)):
            whole[entries] = self.read(entries)
        return whole

    def restore(self, values: torch.Tensor) -> None:
        """Quantize and load `values` [numel], which `stored` returned under this parallel layout or another one."""
        for entries in _chunks(len(self.codes)):
            self.write(entries, values[entries].to(self.codes.device))

    def _spread(self, scales: torch.Tensor, entries: slice) -> torch.Tensor:
        return scales.repeat_interleave(QUANTIZATION_BLOCK)[: len(range(*entries.indices(len(self.codes))))]


def _blocks(entries: slice) -> slice:
    return slice(entries.start // QUANTIZATION_BLOCK, -(-entries.stop // QUANTIZATION_BLOCK))


def _chunks(numel: int) -> list[slice]:
    return [slice(start, min(numel, start + _CHUNK)) for start in range(0, numel, _CHUNK)]


@functools.cache
def code_levels(signed: bool, device: torch.device) -> torch.Tensor:
    """The 256 numbers that codes stand for: fp32 [256], ascending (arXiv 2110.02861, section 1.3, "dynamic tree quantization").

    The number of a code's leading zeros chooses a power of ten from 10^-6 to 1. [0.1, 1] is divided into as many equal parts as the
    other bits have values. These bits choose a part, and the power of ten multiplies its middle. Zero and one are added. With
    `signed`, one bit is the sign, and -1 replaces the negative number nearest to zero. A block's largest magnitude is therefore
    always exact, and quantizing again changes nothing.
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
