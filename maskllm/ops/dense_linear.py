"""Products with a dense matrix, for the linears of compressed models that stay dense."""

from __future__ import annotations

import torch

from maskllm.ops.extension import kernels

FEW_ROWS, FEW_ROWS_NATIVELY = 64, 4
"""The most rows of activations for which the kernel is faster than torch, without and with instructions for the dtype, if it has vector
instructions."""

torch.library.define("maskllm::dense_linear", "(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


def dense_linear(data: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` with fp32 sums, by the loops of `sparse_linear` on a CPU: [..., in] to [..., out]. It has no gradient.

    Args:
        data, weight, bias: [..., in], [out, in] and [out], all fp32, bf16 or fp16. On a CPU the weight is contiguous.
    """
    return torch.ops.maskllm.dense_linear(data, weight, bias)


@torch.library.impl("maskllm::dense_linear", "CompositeExplicitAutograd")
def _reference(data, weight, bias) -> torch.Tensor:
    return torch.nn.functional.linear(data, weight, bias)


@torch.library.register_fake("maskllm::dense_linear")
def _shape(data, weight, bias) -> torch.Tensor:
    return data.new_empty((*data.shape[:-1], weight.shape[0]))


kernels()
