"""The logits that mask learning starts from (design section 2, "Prior"; MaskLLM section 3.3)."""

from __future__ import annotations

import torch

from maskllm.ops import NoiseKey, ShardMap, philox_key
from maskllm.ops.noise import uniform_bits
from maskllm.patterns import Pattern

INITIAL_SIGMA = 0.01
"""Standard deviation of the logits before the prior is added."""


def initial_logits(
    shape: tuple[int, int], pattern: Pattern, *, seed: int, layer_name: str, shard: ShardMap, device: torch.device
) -> torch.Tensor:
    """Draw the initial logits of a layer (or of the shard of it that `shard` describes).

    Args:
        shape: (rows, blocks a row) of the local weight.

    Returns:
        fp32 [rows, blocks, candidates], N(0, INITIAL_SIGMA): a function of the seed, the layer's name and each block's place in the
        unsharded tensor alone, so every parallel layout starts from the same logits.
    """
    key = NoiseKey(philox_key(seed, f"{layer_name}.mask_logits"), 0, shard)
    bits = uniform_bits(key, *shape, pattern.num_candidates, device=device)
    return torch.special.ndtri((bits.double() + 0.5) * 2.0**-21).mul_(INITIAL_SIGMA).float()


def add_prior(logits: torch.Tensor, mask: torch.Tensor, pattern: Pattern, strength: float) -> None:
    """Move `logits` toward a prior mask, in place: (<S_c, m0> - mean over c of <S_c, m0>) * sigma * strength.

    Args:
        logits: fp32 [out, blocks, candidates] from `initial_logits`; sigma is the standard deviation they were drawn with.
        mask: bool [out, in], the prior mask m0.
        strength: the paper's alpha, 3 by default there.
    """
    blocks = mask.view(*logits.shape[:2], pattern.m).to(logits.dtype)
    overlap = blocks @ pattern.candidates(device=logits.device).T
    logits += (overlap - overlap.mean(-1, keepdim=True)) * (INITIAL_SIGMA * strength)
