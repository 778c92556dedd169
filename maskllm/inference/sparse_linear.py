"""The linear layer of a compressed checkpoint: its weight stays compressed in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from maskllm.inference.compressed_format import CompressedMatrix
from maskllm.ops.sparse_linear import TENSORS, Layout, sparse_check, sparse_expand


class SparseLinear(nn.Module):
    """`input @ weight.T + bias` with a weight [out, in] of which only the non-zeros are stored (`maskllm.ops.sparse_linear`).

    It takes the place of a `torch.nn.Linear` or a `Conv1D`. The parameters `values`, `places` and, if the layout has them, `scales` and
    `row_starts` are the stored weight, which has no gradient; `bias` is [out] or None. The gradient of the input is that of a product with
    the dense weight, which the backward pass expands.

    Another dtype (`.to(dtype)`) changes the bias and, unless it is wider, floating-point values; never the scales.

    Args:
        matrix: sizes and layout.
        dtype: what it computes in: the dtype of inputs, of the bias, and of what `weight` shows.
        shapes: of the stored tensors, by name (`maskllm.ops.sparse_linear.Layout.shapes`).
        bias: whether there is one.

    The new parameters have no contents: they are to be loaded, and then checked (`check`) before the first product.
    """

    def __init__(
        self, matrix: CompressedMatrix, dtype: torch.dtype, shapes: dict[str, list[int]], bias: bool, device: torch.device | str
    ) -> None:
        super().__init__()
        self.matrix, self.dtype = matrix, dtype
        dtypes = matrix.layout.dtypes(matrix.values_dtype)
        if dtypes["values"].is_floating_point and dtype.itemsize <= dtypes["values"].itemsize:
            dtypes["values"] = dtype  # as a dense weight's; wider, they would take more memory and be the same numbers
        for key, shape in shapes.items():
            empty = torch.empty(shape, dtype=dtypes[key], device=device)
            self.register_parameter(key, nn.Parameter(empty, requires_grad=False))
        empty = torch.empty(matrix.out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))
        self._numbers = (
            self.layout.numbers
        )  # the operator's; to make them anew takes as long as the operator needs for its arguments

    @property
    def in_features(self) -> int:
        """The size of an input."""
        return self.matrix.in_features

    @property
    def out_features(self) -> int:
        """The size of an output."""
        return self.matrix.out_features

    @property
    def layout(self) -> Layout:
        """How the weight is stored in memory. Floating-point values may have another dtype than in the file."""
        layout = self.matrix.layout
        return layout if layout.quantized else Layout(layout.pattern, 8 * self.values.element_size())

    @property
    def weight(self) -> torch.Tensor:
        """The shape and dtype of the dense weight, on the meta device. `dense_weight` has its contents.

        Models ask for it: T5 casts the input of a linear to the dtype of its weight.
        """
        return torch.empty(self.matrix.dense_shape, dtype=self.dtype, device="meta")

    @property
    def matrix_in_memory(self) -> CompressedMatrix:
        """`matrix` as a save of this module would have it: floating-point values may have another dtype than in the file."""
        if self.values.dtype == self.matrix.values_dtype:
            return self.matrix
        return dataclasses.replace(self.matrix, layout=self.layout, dtype=self.values.dtype)

    @property
    def zeros(self) -> int:
        """The zeros of the dense weight."""
        values = self.values
        if self.layout.bits == 4:
            values = torch.stack([values & 15, values >> 4])
        return self.out_features * self.in_features - int(values.count_nonzero())

    def stored(self) -> dict[str, torch.Tensor]:
        """The stored weight, as the operators take it."""
        return {key: self._parameters[key] for key in TENSORS if key in self._parameters}

    def check(self, name: str, stored: dict[str, torch.Tensor] | None = None) -> None:
        """Raise MaskLLMError unless the stored weight is sound: this module's, or `stored` of the file. `name` is for the message."""
        self._numbers = self.layout.numbers
        tensors, layout = (self.stored(), self.layout) if stored is None else (stored, self.matrix.layout)
        sparse_check(tensors, layout, self.out_features, self.in_features, name)

    def dense_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in the shape in which the dense module has it, by default in this module's dtype."""
        weight = sparse_expand(self.stored(), self.layout, self.in_features, dtype or self.dtype)
        return weight.t().contiguous() if self.matrix.transposed else weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` [..., in] to [..., out] of its dtype."""
        return self.product(input, self._parameters["bias"])

    def product(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`forward` with another bias, [out] or None."""
        if bias is not None and bias.dtype != input.dtype:  # autocast has changed the input
            bias = bias.to(input.dtype)
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            return _WithGradient.apply(input, bias, self)
        return self._product(input, bias)

    def _product(self, input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = self._parameters
        return torch.ops.maskllm.sparse_linear(
            input,
            weight["values"],
            weight["places"],
            weight.get("scales"),
            weight.get("row_starts"),
            bias,
            *self._numbers,
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        before = {key: tensor.data for key, tensor in self.stored().items() if tensor.is_floating_point()}
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = self._parameters[key]
            if key == "scales" or new.element_size() > old.element_size():
                new.data = old.to(new.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.values.device)).dtype
        self._numbers = self.layout.numbers
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        layout = self.layout
        kind = "unstructured" if layout.pattern is None else str(layout.pattern)
        group = f", group_size={layout.group_size}" if layout.quantized else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {kind}, bits={layout.bits}{group}, "
            f"bias={self.bias is not None}"
        )


class _WithGradient(torch.autograd.Function):
    """A product with the gradients of its input and its bias."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, linear: SparseLinear) -> torch.Tensor:
        ctx.linear = linear
        return linear._product(input, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            linear = ctx.linear
            of_input = gradient @ sparse_expand(linear.stored(), linear.layout, linear.in_features, gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.flatten(0, -2).sum(0)
        return of_input, of_bias, None
