"""N:M sparsity patterns: the candidate masks of a block, and masks as bits.

A pattern N:M keeps N of every M consecutive weights along a matrix's input dimension. Its candidates are the C(M, N) binary rows
with N ones, in lexicographic order of the kept positions (MaskLLM, arXiv 2409.17481, section 3.2). For 2:4 they are 1100, 1010,
1001, 0110, 0101, 0011.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from maskllm.errors import MaskLLMError

MAX_CANDIDATES = 128
"""The largest number of candidates for which a mask can be learned."""

MAX_M = 64
"""The largest block of a pattern."""

MAX_LEARNED_M = 32
"""The largest M for which a mask can be learned."""


@dataclass(frozen=True)
class Pattern:
    """An N:M pattern: N of every M consecutive weights are kept. Raises MaskLLMError unless 0 < N < M <= 64."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m <= MAX_M:
            raise MaskLLMError(f"pattern {self.n}:{self.m}: wanted N:M with 0 < N < M <= {MAX_M}, for example 2:4")

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse "N:M". Raises MaskLLMError for anything else."""
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
        pattern = cls(int(match[1]), int(match[2])) if match else None
        if pattern is None or str(pattern) != text:  # checkpoints store the text, so 02:4 must not mean 2:4
            raise MaskLLMError(f"pattern {text[:40]!r}: wanted N:M, for example 2:4")
        return pattern

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def num_candidates(self) -> int:
        """C(M, N), the number of possible masks of a block."""
        return math.comb(self.m, self.n)

    @property
    def sparsity(self) -> float:
        """The share of weights that are removed."""
        return 1 - self.n / self.m

    def require_learnable(self) -> None:
        """Raise MaskLLMError if a block has more than MAX_LEARNED_M weights or MAX_CANDIDATES candidates."""
        if self.m > MAX_LEARNED_M:
            raise MaskLLMError(f"pattern {self}: masks can be learned for M up to {MAX_LEARNED_M}")
        if self.num_candidates > MAX_CANDIDATES:
            raise MaskLLMError(
                f"pattern {self} has {self.num_candidates} candidate masks per block; learning supports at most {MAX_CANDIDATES}"
            )

    def candidates(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
        """The candidate matrix `S`, [C(M, N), M], of zeros and ones."""
        return torch.from_numpy(_candidates(self.n, self.m).copy()).to(device=device, dtype=dtype)

    def check_divides(self, in_features: int, name: str) -> None:
        """Raise MaskLLMError if rows of `in_features` weights do not split into whole blocks. `name` is the tensor's name."""
        if in_features % self.m:
            raise MaskLLMError(
                f"{name}: its (shard's) input dimension {in_features} is not a multiple of {self.m}, so pattern {self} does not "
                "fit; use another pattern or, with Megatron, a smaller tensor-model-parallel size"
            )


@functools.lru_cache
def _candidates(n: int, m: int) -> np.ndarray:
    rows = np.zeros((math.comb(m, n), m), dtype=np.uint8)
    for row, kept in zip(rows, itertools.combinations(range(m), n), strict=True):
        row[list(kept)] = 1
    return rows


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask [out, in] to bits, uint8 [out, ceil(in / 8)], row by row, high bit first, as `numpy.packbits(axis=1)` does."""
    bits = torch.nn.functional.pad(mask.bool(), (0, -mask.shape[1] % 8)).view(torch.uint8)
    packed = bits[:, 0::8] << 7
    for place in range(1, 8):
        packed |= bits[:, place::8] << (7 - place)
    return packed


def unpack_mask(bits: torch.Tensor, in_features: int) -> torch.Tensor:
    """The mask, bool [out, in_features], from `pack_mask`'s bits."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :in_features].bool()


def blocks_that_differ(bits: torch.Tensor, other: torch.Tensor, in_features: int, m: int) -> torch.Tensor:
    """How many blocks of `m` weights two masks, given as `pack_mask`'s bits, treat differently: int64 []."""
    return unpack_mask(bits ^ other, in_features).view(-1, m).any(-1).sum()
