"""The noise of a mask draw: a pure function of seed, layer, block, candidate and sample.

The generator is Philox-4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). It maps a counter and a key
to random bits. The counter holds the index of a block in the unsharded tensor, so the noise does not depend on the sharding.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF

UNIFORM_BITS = 21
"""Bits of a uniform draw: three draws fit each half of a Philox call's 128 bits."""

DRAWS_PER_CALL = 6
"""Uniform draws of one Philox call. A 2:4 block has six candidates and costs one call."""

ROUNDING_BITS = 16
"""Bits of a random number for stochastic rounding: fp32 has 16 bits more than bf16. A Philox call yields eight numbers."""


def philox_key(seed: int, layer_name: str) -> int:
    """The 64-bit Philox key of a layer in a run: the 8-byte BLAKE2b digest of "SEED:LAYER_NAME", little-endian.

    `layer_name` is the layer's name in the unsharded model, for example "decoder.layers.3.mlp.linear_fc1".
    """
    return int.from_bytes(hashlib.blake2b(f"{seed}:{layer_name}".encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class ShardMap:
    """Maps the blocks of a tensor-parallel shard to their places in the unsharded tensor.

    Local row `r` is global row `row_offset + r`; from `split_row` on it is `split_offset + (r - split_row)`, since the shard of a
    gated fc1 holds gate rows and then up rows. Local block column `b` is global block column `block_offset + b`. The unsharded
    tensor has `blocks_per_row` blocks in a row.
    """

    blocks_per_row: int
    block_offset: int = 0
    row_offset: int = 0
    split_row: int | None = None
    split_offset: int = 0

    def global_rows(self, rows: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The global row of each of the first `rows` local rows, int64 [rows]."""
        return self.global_row(torch.arange(rows, dtype=torch.int64, device=device))

    def global_row(self, local: torch.Tensor) -> torch.Tensor:
        """The global rows of the local rows `local` (int64, any shape)."""
        if self.split_row is None:
            return self.row_offset + local
        return torch.where(local < self.split_row, self.row_offset + local, self.split_offset - self.split_row + local)

    def numbers(self) -> list[int]:
        """The five integers that the operators take. Without a split, the split row is the largest int64."""
        if self.split_row is None:
            return [self.blocks_per_row, self.block_offset, self.row_offset, (1 << 63) - 1, 0]
        return [self.blocks_per_row, self.block_offset, self.row_offset, self.split_row, self.split_offset]

    def blocks(self, rows: int, blocks: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The index of each local block in the flattened unsharded tensor, int64 [rows, blocks]."""
        columns = self.block_offset + torch.arange(blocks, dtype=torch.int64, device=device)
        return self.global_rows(rows, device).unsqueeze(1) * self.blocks_per_row + columns


@dataclass(frozen=True)
class NoiseKey:
    """Determines a layer's mask draw: the Philox key, the global sample index and the shard's place."""

    key: int
    sample: int
    shard: ShardMap

    @property
    def signed_key(self) -> int:
        """`key` as a signed 64-bit integer, which the operators take."""
        return self.key - (1 << 64) if self.key >> 63 else self.key


def philox(counter: tuple[torch.Tensor, ...], key: int) -> tuple[torch.Tensor, ...]:
    """Philox-4x32-10: four 32-bit words (in int64 tensors) from four 32-bit counter words and a 64-bit key.

    The int64 products wrap modulo 2^64, which keeps their low and high words correct.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def uniform_bits(key: NoiseKey, rows: int, blocks: int, candidates: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The 21-bit draws of a shard's blocks, int64 [rows, blocks, candidates].

    The counter's four words are: the low word of the block's global index; its next 24 bits, with the call's number in the top 8
    bits; the low and the high word of the sample. Candidate c uses call c // 6. Each half of a call's 128 bits holds three 21-bit
    fields, the lowest first.
    """
    block = key.shard.blocks(rows, blocks, device)
    low, high = block & _WORD, block >> 32 & 0xFFFFFF
    sample_low = torch.full_like(block, key.sample & _WORD)
    sample_high = torch.full_like(block, key.sample >> 32 & _WORD)
    mask = (1 << UNIFORM_BITS) - 1
    fields: list[torch.Tensor] = []
    for call in range(-(-candidates // DRAWS_PER_CALL)):
        words = philox((low, high | call << 24, sample_low, sample_high), key.key)
        for half in (words[0] | words[1] << 32, words[2] | words[3] << 32):
            fields += [half >> shift & mask for shift in (0, UNIFORM_BITS, 2 * UNIFORM_BITS)]
    return torch.stack(fields[:candidates], dim=-1)


def rounding_bits(
    key: NoiseKey, blocks: int, first: int, count: int, candidates: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """16-bit random numbers for `count` blocks of a shard from its block `first` on, int64 [count, candidates].

    `blocks` is the number of blocks in a row of the shard. The counter is that of `uniform_bits`, with candidate c in call c // 8.
    The number of candidate c is half of word c % 8 // 2: the low half for even c, the high half for odd c.
    """
    local = first + torch.arange(count, dtype=torch.int64, device=device)
    block = key.shard.global_row(local // blocks) * key.shard.blocks_per_row + key.shard.block_offset + local % blocks
    low, high = block & _WORD, block >> 32 & 0xFFFFFF
    sample_low = torch.full_like(block, key.sample & _WORD)
    sample_high = torch.full_like(block, key.sample >> 32 & _WORD)
    numbers: list[torch.Tensor] = []
    for call in range(-(-candidates // 8)):
        for word in philox((low, high | call << 24, sample_low, sample_high), key.key):
            numbers += [word & 0xFFFF, word >> ROUNDING_BITS]
    return torch.stack(numbers[:candidates], dim=-1)


def gumbel(key: NoiseKey, rows: int, blocks: int, candidates: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Standard Gumbel noise of a shard's blocks, `dtype` (fp32 or fp64) [rows, blocks, candidates].

    `u = (k + 1/2) 2^-21` is exact in fp32 and strictly inside (0, 1), so -log(-log u) lies in (-2.73, 15.3).
    """
    uniform = (uniform_bits(key, rows, blocks, candidates, device).to(dtype) + 0.5) * 2.0**-UNIFORM_BITS
    return -torch.log(-torch.log(uniform))
