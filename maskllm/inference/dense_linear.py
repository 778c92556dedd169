"""The linear layers of a compressed checkpoint that stay dense, such as the output layer."""

from __future__ import annotations

import torch
from torch import nn

from maskllm.environment.cpu_speed import computes_natively
from maskllm.ops.dense_linear import FEW_ROWS, FEW_ROWS_NATIVELY, dense_linear
from maskllm.ops.extension import kernels

_FEW_ROWS = {
    dtype: FEW_ROWS_NATIVELY if computes_natively(dtype) else FEW_ROWS for dtype in (torch.bfloat16, torch.float16)
}  # a table, which torch.compile reads as constants
if (_compiled := kernels()) is not None and _compiled.instruction_set() == "portable":
    _FEW_ROWS = {}  # torch's products are faster than loops without vector instructions


class DenseLinear(nn.Linear):
    """`torch.nn.Linear`, of which a few rows in 16 bits, on a CPU and without a gradient, are `dense_linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` [..., in] to [..., out] of its dtype."""
        of_gradient = (input, self.weight, *([] if self.bias is None else [self.bias]))
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in of_gradient)
        few = input.device.type == "cpu" and input.numel() <= _FEW_ROWS.get(input.dtype, 0) * self.in_features
        if few and not trains and self.weight.dtype == input.dtype and self.weight.is_contiguous():
            return dense_linear(input, self.weight, self.bias)
        return super().forward(input)
