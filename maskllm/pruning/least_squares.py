"""The kept weights of a mask by least squares: those with which a matrix's outputs are closest to the dense matrix's."""

from __future__ import annotations

import torch

_ROWS = 4096
"""Rows that are solved at a time. It bounds the memory for temporary tensors."""

_MAX_STEPS = 200
"""Steps of conjugate gradients at most. SmolLM2-135M's matrices take 20 to 60."""

_TOLERANCE = 1e-5
"""A row is solved if its residual's norm has this share of the right-hand side's."""


def least_squares(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The `sparse` weight [out, in], 0 outside of `mask`, with the smallest trace((sparse - weight) H (sparse - weight)^T).

    With a `hessian` H [in, in] that is proportional to X X^T plus damping, that is the smallest squared error of the outputs over the
    calibration tokens. H is positive definite. Each row's weights solve the normal equations of the inputs that the row keeps.
    SparseGPT's sweep does not reach them, since it never changes the columns that it has passed.

    All rows are solved at once by conjugate gradients with H's diagonal as the preconditioner, from `start` [out, in].
    The result has the dtype of H, as have all computations. `mask` is bool [out, in].
    """
    solved = [
        _solve(rows.to(hessian.dtype), hessian, kept, first.to(hessian.dtype))
        for rows, kept, first in zip(weight.split(_ROWS), mask.split(_ROWS), start.split(_ROWS), strict=True)
    ]
    return torch.cat(solved)


def _solve(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Preconditioned conjugate gradients, for each row by itself. A row that is solved no longer moves."""
    inverse_diagonal = hessian.diagonal().reciprocal()
    wanted = (weight @ hessian).mul_(mask)
    sparse = start * mask
    residual = wanted - (sparse @ hessian).mul_(mask)
    smallest = _TOLERANCE * wanted.norm(dim=1)
    direction = torch.zeros_like(residual)
    last = torch.ones_like(smallest)
    for _ in range(_MAX_STEPS):
        moving = residual.norm(dim=1) > smallest
        if not moving.any():
            break
        scaled = residual * inverse_diagonal
        power = (residual * scaled).sum(dim=1)
        direction.mul_((power / last).unsqueeze(1)).add_(scaled)
        product = (direction @ hessian).mul_(mask)
        length = torch.where(moving, power / (direction * product).sum(dim=1), 0).unsqueeze(1)
        sparse.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        last = power
    return sparse
