"""The kernels: mask sampling fused with the weight, winners, and the 2:4 check."""

from maskllm.ops.masked_weight import masked_weight
from maskllm.ops.noise import NoiseKey, ShardMap, philox_key
from maskllm.ops.winner import check_mask, winner_bits, winner_mask

__all__ = ["NoiseKey", "ShardMap", "check_mask", "masked_weight", "philox_key", "winner_bits", "winner_mask"]
