"""Operators with CPU and CUDA kernels: the mask method's, 2:4 compression, and products with matrices stored without zeros."""

from maskllm.ops.compress24 import compress24, decompress24
from maskllm.ops.dense_linear import dense_linear
from maskllm.ops.masked_weight import masked_weight
from maskllm.ops.noise import NoiseKey, ShardMap, philox_key
from maskllm.ops.rounding import rounding_bits, stochastic_bf16
from maskllm.ops.sparse24 import Sparse24Linear
from maskllm.ops.sparse_linear import Layout, sparse_check, sparse_expand, sparse_linear, sparse_pack
from maskllm.ops.winner import check_mask, winner_bits, winner_bits_of_all, winner_mask

__all__ = [
    "Layout",
    "NoiseKey",
    "ShardMap",
    "Sparse24Linear",
    "check_mask",
    "compress24",
    "decompress24",
    "dense_linear",
    "masked_weight",
    "philox_key",
    "rounding_bits",
    "sparse_check",
    "sparse_expand",
    "sparse_linear",
    "sparse_pack",
    "stochastic_bf16",
    "winner_bits",
    "winner_bits_of_all",
    "winner_mask",
]
