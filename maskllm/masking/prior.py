"""The initial mask logits and the prior mask (design section 2, "Prior"; MaskLLM section 3.3)."""

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
    """Draw the initial logits of a layer, or of the part of the layer that `shard` describes.

    Args:
        shape: (rows, blocks per row) of the local weight.

    Returns:
        fp32 [rows, blocks, candidates], normally distributed with mean 0 and standard deviation INITIAL_SIGMA. They depend only on
        the seed, the layer's name and each block's position in the unsharded tensor, so every parallel layout starts from the same
        logits.
    """
    key = NoiseKey(philox_key(seed, f"{layer_name}.mask_logits"), 0, shard)
    bits = uniform_bits(key, *shape, pattern.num_candidates, device=device)
    return torch.special.ndtri((bits.double() + 0.5) * 2.0**-21).mul_(INITIAL_SIGMA).float()


def add_prior(logits: torch.Tensor, mask: torch.Tensor, pattern: Pattern, strength: float) -> None:
    """Move `logits` toward a prior mask, in place: (<S_c, m0> - mean over c of <S_c, m0>) * sigma * strength.

    Args:
        logits: fp32 [out, blocks, candidates] from `initial_logits`. Sigma in the formula is INITIAL_SIGMA.
        mask: bool [out, in], the prior mask m0.
        strength: the paper's alpha. The paper's default is 3.
    """
    blocks = mask.view(*logits.shape[:2], pattern.m).to(logits.dtype)
    overlap = blocks @ pattern.candidates(device=logits.device).T
    logits += (overlap - overlap.mean(-1, keepdim=True)) * (INITIAL_SIGMA * strength)
