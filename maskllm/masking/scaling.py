"""Weight scaling of CAST (arXiv 2509.25996, section IV-B, equations 11 and 12): each row of a weight is cut into groups of consecutive
columns, and each group of a row has one learnable factor. It gives back the magnitude that the decay takes."""

from __future__ import annotations

from typing import Any

import torch

GROUPS = 2
"""Groups of columns (section VI-A: n = 2)."""


def group_boundary(columns: int, m: int) -> int:
    """The first column of the second group of `columns` columns: the middle, or the start of the block of `m` columns that it cuts.

    All weights of a block have the same factor, so scaling does not change which of them are the largest.
    """
    return columns // m // GROUPS * m


class _Scaled(torch.autograd.Function):
    """The product, which keeps the two factors alone and makes no fp32 copy of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scales: torch.Tensor, boundary: int) -> torch.Tensor:
        ctx.save_for_backward(weight, scales)
        ctx.boundary = boundary
        return _multiplied(weight, scales, boundary)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        weight, scales = ctx.saved_tensors
        of_weight = of_scales = None
        if ctx.needs_input_grad[1]:
            products = weight.to(scales.dtype, copy=True).mul_(grad)
            of_scales = torch.stack([products[:, : ctx.boundary].sum(1), products[:, ctx.boundary :].sum(1)], 1)
            del products
        if ctx.needs_input_grad[0]:
            of_weight = _multiplied(grad, scales, ctx.boundary)
        return of_weight, of_scales, None


def scaled(weight: torch.Tensor, scales: torch.Tensor, boundary: int) -> torch.Tensor:
    """`weight` [out, in] times `scales` [out, GROUPS] in `weight`'s dtype, rounded once; the second factor from column `boundary` on."""
    return _Scaled.apply(weight, scales, boundary)


def _multiplied(matrix: torch.Tensor, scales: torch.Tensor, boundary: int) -> torch.Tensor:
    product = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    for group, columns in enumerate((slice(0, boundary), slice(boundary, None))):
        torch.mul(matrix[:, columns], scales[:, group : group + 1], out=product[:, columns])
    return product
