"""Stochastic rounding of fp32 to bf16 that does not depend on the layout.

A value is rounded to one of its two neighbours; the nearer one is the more probable, so that the mean is right. The random numbers
are a pure function of seed, layer, block, candidate and step, like the noise of a mask draw.
"""

from __future__ import annotations

import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import noise
from maskllm.ops.extension import kernels, warn_if_reference
from maskllm.ops.noise import ROUNDING_BITS, NoiseKey, ShardMap

torch.library.define("maskllm::rounding", "(int blocks, int first, int key, int sample, int[] shard, Tensor(a!) out) -> ()")


def rounding_bits(
    key: NoiseKey, blocks: int, first: int, count: int, candidates: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Random numbers below 2^16 for `count` blocks of a shard, one per candidate.

    Args:
        key: determines the numbers. Its sample is the optimizer's step, and its shard maps the blocks to the unsharded tensor.
        blocks: number of blocks in a row of the shard.
        first: index of the first block in the flattened shard.

    Returns:
        int32 [count, candidates].
    """
    out = torch.empty(count, candidates, dtype=torch.int32, device=device)
    warn_if_reference(out.device.type)
    torch.ops.maskllm.rounding(blocks, first, key.signed_key, key.sample, key.shard.numbers(), out)
    return out


def stochastic_bf16(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Round `values` (fp32) to bf16: away from zero with probability remainder / 2^16, else toward zero.

    `bits` are int32 random numbers from `rounding_bits`, one per value. Values that bf16 represents exactly stay the same, and so
    do infinities and NaN. Raises MaskLLMError if the dtype is another or the numbers do not match.
    """
    if values.dtype != torch.float32 or values.numel() != bits.numel():
        raise MaskLLMError(f"stochastic_bf16: {values.dtype} {list(values.shape)} with {bits.numel()} random numbers")
    bits = bits.view(values.shape)
    raised = ((values.view(torch.int32) + bits) >> ROUNDING_BITS).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), raised, values.to(torch.bfloat16))


@torch.library.impl("maskllm::rounding", "CompositeExplicitAutograd")
def _reference(blocks: int, first: int, key: int, sample: int, shard: list[int], out: torch.Tensor) -> None:
    place = NoiseKey(key % (1 << 64), sample, ShardMap(*shard))
    out.copy_(noise.rounding_bits(place, blocks, first, *out.shape, device=out.device))


@torch.library.register_fake("maskllm::rounding")
def _shapes(*_args, **_kwargs) -> None:
    return None


kernels()
