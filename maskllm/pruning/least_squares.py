"""The kept weights of a mask by least squares: those with which a matrix's outputs are closest to the dense matrix's."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

_ROWS = 1024
"""Rows that are solved at a time. It bounds the memory for temporary tensors."""

_MAX_STEPS = 200
"""Steps of conjugate gradients at most."""

_TOLERANCE = 1e-5
"""A row is solved if its residual's norm has this share of the right-hand side's."""


def least_squares(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, name: str) -> torch.Tensor:
    """The `sparse` weight [out, in], 0 outside of `mask`, with the smallest trace((sparse - weight) H (sparse - weight)^T).

    With a `hessian` H [in, in] that is proportional to X X^T plus damping, that is the smallest squared error of the outputs over the
    calibration tokens. H is positive definite, and its diagonal has a mean near 1. Each row's weights solve the normal equations of the
    inputs that the row keeps. SparseGPT's sweep does not reach them, since it never changes the columns that it has passed.

    All rows are solved at once by conjugate gradients with H's diagonal as the preconditioner, from `start` [out, in]. A row that is not
    solved in 200 steps keeps what it has reached; a warning gives `name`, the matrix's.
    The sparse weight is fp32, or fp64 if `weight` is. `mask` is bool [out, in].
    """
    hessian = hessian.to(torch.promote_types(weight.dtype, torch.float32))
    parts = zip(weight.split(_ROWS), mask.split(_ROWS), start.split(_ROWS), strict=True)
    solved, unsolved = zip(*(_solve(rows, hessian, kept, first) for rows, kept, first in parts), strict=True)
    if sum(unsolved):
        logger.warning("%s: least squares left %d of %d rows after %d steps", name, sum(unsolved), len(weight), _MAX_STEPS)
    return torch.cat(solved)


def _solve(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Preconditioned conjugate gradients, for each row by itself, and how many rows are not solved. A row that is solved stays."""
    inverse_diagonal = hessian.diagonal().reciprocal()
    wanted = (weight.to(hessian.dtype) @ hessian).mul_(mask)
    sparse = start.to(hessian.dtype) * mask
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
        direction.mul_(torch.where(moving, power / last, 0).unsqueeze(1)).add_(scaled)
        product = (direction @ hessian).mul_(mask)
        length = torch.where(moving, power / (direction * product).sum(dim=1), 0).unsqueeze(1)
        sparse.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        last = power
    return sparse, int((residual.norm(dim=1) > smallest).sum())
