"""The linear layers of a compressed checkpoint that stay dense, such as the output layer."""

from __future__ import annotations

import torch
from torch import nn


class DenseLinear(nn.Linear):
    """`torch.nn.Linear` without bias, on a CPU without bf16 instructions: one row of bf16 is a product of matrix and vector.

    There `torch.mv` reads the weight faster than `torch.nn.functional.linear` does. Both have fp32 sums.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` [..., in] to [..., out] of its dtype."""
        if input.numel() == self.in_features and input.dtype == torch.bfloat16 and input.device.type == "cpu":
            return torch.mv(self.weight, input.reshape(-1)).view(*input.shape[:-1], self.out_features)
        return super().forward(input)
