"""A linear of a transformers model whose weight passes through a mask, on plain torch modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from transformers.pytorch_utils import Conv1D

from maskllm.errors import MaskLLMError
from maskllm.masking.parameter import Location, MaskedParameter


class MaskedLinear(torch.nn.Module):
    """Stands in for a `torch.nn.Linear` or a `Conv1D` (GPT-2), and holds its `weight` and `bias` parameters until `to_plain`.

    Some modules multiply by a linear's weight without calling the linear: Mamba's, and WavLM's attention. While masks are learned, they
    read a `_ReadWeight` in a forward pass, so that these products are masked too.
    """

    def __init__(self, linear: torch.nn.Linear | Conv1D, location: Location) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.masked = MaskedParameter(self, location, transposed=isinstance(linear, Conv1D))
        linear.weight = linear.bias = None
        self._emptied = [linear]  # in a list, so that it is no part of this module

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return _ReadWeight.of(found, self.masked) if name == "weight" and self.masked.is_learned_in_pass else found

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply `input` [..., in] by the masked weight and add the bias; returns [..., out]."""
        with self.masked.weight_for_product() as weight:
            return F.linear(input, weight, self.bias)

    def to_plain(self) -> torch.nn.Linear | Conv1D:
        """The linear that this one stands in for, with the parameters as they are now, without a mask."""
        (linear,) = self._emptied
        linear.weight, linear.bias = self.weight, self.bias
        return linear


class _ReadWeight(torch.Tensor):
    """A linear's weight, whose values in any function of torch are those of the masked weight. Its dtype, device and shape cost nothing."""

    masked: MaskedParameter
    has_grad: bool
    """Whether gradients were recorded when it was read."""

    @classmethod
    def of(cls, weight: torch.Tensor, masked: MaskedParameter) -> _ReadWeight:
        read = weight.as_subclass(cls)
        read.masked, read.has_grad = masked, torch.is_grad_enabled()
        return read

    def values(self) -> torch.Tensor:
        """The masked weight, in the layout of the linear's own.

        Raises MaskLLMError if it is used inside of a `torch.autograd.Function` that was given this one: no gradient would reach the mask.
        """
        if self.has_grad and not torch.is_grad_enabled():
            raise MaskLLMError(
                f"{self.masked.location.name}: a fused kernel multiplies by its weight, so its mask would get no gradient; run the model "
                "without that kernel (for Mamba: uninstall mamba-ssm, and load the model without use_kernels)"
            )
        weight = self.masked.effective_weight()
        return weight.t() if self.masked.transposed else weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__" and not isinstance(found := func(*args), torch.Tensor):
                return found
            args, kwargs = tree_map_only(cls, cls.values, (args, kwargs or {}))
            return func(*args, **kwargs)
