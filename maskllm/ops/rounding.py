"""Stochastic rounding that does not depend on the layout: up with the probability of being nearer to the upper neighbour.

The random numbers are a pure function of seed, layer, block, candidate and step, like the noise of a mask draw.
"""

from __future__ import annotations

import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import noise
from maskllm.ops.extension import kernels, tell_if_reference
from maskllm.ops.noise import ROUNDING_BITS, NoiseKey, ShardMap

torch.library.define("maskllm::rounding", "(int blocks, int first, int key, int sample, int[] shard, Tensor(a!) out) -> ()")


def rounding_bits(
    key: NoiseKey, blocks: int, first: int, count: int, candidates: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Random numbers below 2^16 for `count` blocks of a shard, one a candidate.

    Args:
        key: what they are a function of, with the optimizer's step for the sample; `key.shard` says where the shard lies.
        blocks: blocks in a row of the shard.
        first: the first block's index in the flattened shard.

    Returns:
        int32 [count, candidates].
    """
    out = torch.empty(count, candidates, dtype=torch.int32, device=device)
    tell_if_reference(out.device.type)
    torch.ops.maskllm.rounding(blocks, first, key.signed_key, key.sample, key.shard.numbers(), out)
    return out


def stochastic_bf16(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """`values` (fp32) as bf16: the neighbour away from zero with probability remainder / 2^16, else the one toward zero.

    `bits` are the int32 random numbers of `rounding_bits`, as many as there are values. A value that bf16 holds stays what it is;
    infinities and NaN do too.
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
