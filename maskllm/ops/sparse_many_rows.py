"""Products of many rows with stored matrices on CUDA, more than the kernel of `csrc/cuda/sparse.cu` takes.

The matrix is made dense for the product. torch multiplies it, or cuSPARSELt if it has 2:4 products of that dtype and is faster, the
compression for it included. Which one is faster is measured once for each shape, dtype, power of two of rows, GPU and version of the
library, on the first product of that kind, and kept in the file of `AlgorithmCache`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from maskllm.ops.algorithm_cache import AlgorithmCache, algorithm_key, token_bucket
from maskllm.ops.extension import kernels
from maskllm.ops.sparse24 import can_multiply

torch.library.define(
    "maskllm::sparse_linear_many_rows",
    "(Tensor input, Tensor values, Tensor places, Tensor? scales, Tensor? row_starts, Tensor? bias, int n, int m, int bits, "
    "int group_size) -> Tensor",
)

_MULTIPLE = 16
"""cuSPARSELt wants sizes that are multiples of this, and a bias that starts at a multiple of it."""


@torch.library.impl("maskllm::sparse_linear_many_rows", "CompositeExplicitAutograd")
@torch.no_grad()
def _many_rows(data, values, places, scales, row_starts, bias, n, m, bits, group_size) -> torch.Tensor:
    """`data` is [rows, in]; the result is [rows, out]."""
    weight = torch.ops.maskllm.sparse_expand(values, places, scales, row_starts, data.shape[1], n, m, bits, group_size, data.dtype)
    if (n, m) == (2, 4) and _fits_cusparselt(weight, bias):
        key = _key(data, weight, bias)
        algorithm = _cache().get(key)
        if algorithm is None and not torch.cuda.is_current_stream_capturing():
            algorithm = _faster(data, weight, bias)
            _cache().put(key, algorithm)
        if algorithm:
            try:
                return _cusparselt(data, weight, bias, algorithm)
            except RuntimeError as error:
                _cache().refuse(key, error, "torch multiplies until the next measurement")
    return torch.nn.functional.linear(data, weight, bias)


def _fits_cusparselt(weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    module = kernels()
    return (
        module is not None
        and module.has_cusparselt
        and can_multiply(weight.device)
        and weight.dtype in (torch.bfloat16, torch.float16)
        and not any(size % _MULTIPLE for size in weight.shape)
        and (bias is None or bias.data_ptr() % _MULTIPLE == 0)
    )


@functools.cache
def _cache() -> AlgorithmCache:
    return AlgorithmCache()


def _key(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> str:
    gpu, version = torch.cuda.get_device_name(weight.device), torch.backends.cusparselt.version()
    product = algorithm_key(*weight.shape, token_bucket(len(data)), weight.dtype, bias is not None, "", gpu, version)
    return f"{product} compressed each time"


def _cusparselt(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, algorithm: list[int]) -> torch.Tensor:
    compressed = torch.ops.maskllm.cusparselt_compress(weight)
    return torch.ops.maskllm.cusparselt_linear(data, compressed, len(weight), bias, "", algorithm)


def _faster(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> list[int]:
    """The fastest algorithm of cuSPARSELt if it is faster than torch's product, else an empty list."""
    dense = _milliseconds(lambda: torch.nn.functional.linear(data, weight, bias))
    if _milliseconds(lambda: torch.ops.maskllm.cusparselt_compress(weight)) >= dense:
        return []
    compressed = torch.ops.maskllm.cusparselt_compress(weight)
    algorithm = torch.ops.maskllm.cusparselt_search(data, compressed, len(weight), bias, "")
    return list(algorithm) if _milliseconds(lambda: _cusparselt(data, weight, bias, algorithm)) < dense else []


def _milliseconds(work: Callable[[], object], turns: int = 10) -> float:
    """The time of a call on the GPU."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(turns):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / turns


kernels()
