"""A linear of a transformers model whose weight passes through a mask, on plain torch modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.pytorch_utils import Conv1D

from maskllm.masking.parameter import Location, MaskedParameter


class MaskedLinear(torch.nn.Module):
    """Stands in for a `torch.nn.Linear` or a `Conv1D` (GPT-2), and holds its `weight` and `bias` parameters until `to_plain`."""

    def __init__(self, linear: torch.nn.Linear | Conv1D, location: Location) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.masked = MaskedParameter(self, location, transposed=isinstance(linear, Conv1D))
        linear.weight = linear.bias = None
        self._emptied = [linear]  # in a list, so that it is no part of this module

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply `input` [..., in] by the masked weight and add the bias; returns [..., out]."""
        with self.masked.weight_for_product() as weight:
            return F.linear(input, weight, self.bias)

    def to_plain(self) -> torch.nn.Linear | Conv1D:
        """The linear that this one stands in for, with the parameters as they are now, without a mask."""
        (linear,) = self._emptied
        linear.weight, linear.bias = self.weight, self.bias
        return linear
