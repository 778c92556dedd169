"""The linear layers of a compressed checkpoint that stay dense, such as the output layer."""

from __future__ import annotations

import torch
from torch import nn

from maskllm.ops.dense_linear import FEW_ROWS, dense_linear


class DenseLinear(nn.Linear):
    """`torch.nn.Linear` on a CPU without bf16 instructions: a few rows in 16 bits, without a gradient, are `dense_linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` [..., in] to [..., out] of its dtype."""
        trains = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        few = input.dtype.itemsize == 2 and input.device.type == "cpu" and input.numel() <= FEW_ROWS * self.in_features
        if few and not trains and self.weight.is_contiguous():
            return dense_linear(input, self.weight, self.bias)
        return super().forward(input)
