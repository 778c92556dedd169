"""SparseGPT: pruning by approximate second-order reconstruction (arXiv 2301.00774, section 3 and algorithm 1)."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from maskllm.errors import MaskLLMError
from maskllm.masking.selection import Sparsity, check_sparsity, keep_of_all, keep_of_each_block
from maskllm.patterns import Pattern

logger = logging.getLogger(__name__)

BLOCK_SIZE = 128
"""Columns that are swept before their errors are propagated to all later columns (the paper's B)."""

DAMPING = 0.01
"""Share of the Hessian's mean diagonal that is added to its diagonal (appendix A of the paper)."""

_MAX_DAMPING = 1e3
"""With this damping, a positive semi-definite Hessian of any width has a Cholesky factor in fp32."""

_UNSTRUCTURED_STEP = 16
"""Without a pattern: columns of a block that are swept between updates of the rest of the block. It affects speed only."""


@dataclass(frozen=True)
class HessianFactor:
    """The parts of a Hessian that the sweep needs."""

    upper: torch.Tensor
    """fp32 [in, in], upper triangular, with H^-1 = upper^T upper."""
    dead: torch.Tensor
    """bool [in]: inputs that are 0 for every token."""
    damping: float
    """The damping that was used."""


def factor_hessian(hessian: torch.Tensor, name: str, *, damping: float = DAMPING) -> HessianFactor:
    """The upper Cholesky factor of the inverse of the damped `hessian`, fp32 [in, in], which is overwritten.

    Inputs that are always 0 get 1 on the diagonal. If the Hessian is too close to singular for fp32, the damping is multiplied by
    ten and the factorization repeated; a warning gives `name`, the matrix's. Raises MaskLLMError if the diagonal is not finite and
    non-negative, or if the Hessian has no factor with the largest damping either.
    """
    diagonal = hessian.diagonal()
    if not (diagonal.isfinite().all() and (diagonal >= 0).all()):
        raise MaskLLMError(
            f"{name}: the diagonal of its inputs' Hessian is not finite and non-negative; the statistics are damaged"
        )
    dead = diagonal == 0
    diagonal[dead] = 1
    undamped, mean = diagonal.clone(), diagonal.mean()
    while True:
        diagonal.copy_(undamped + damping * mean)
        # Let J reverse the order of the inputs. J H J = L L^T gives H = U U^T for the upper triangular U = J L J, so H^-1 is
        # (U^-1)^T U^-1. The paper inverts H and factors the inverse. This takes half the work and only one factorization's error.
        root, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            root = root.flip(0, 1)
            upper = torch.linalg.solve_triangular(root, torch.eye(len(hessian), device=hessian.device), upper=True)
            if torch.stack(upper.aminmax()).isfinite().all():  # aminmax propagates NaN and makes no copies
                return HessianFactor(upper, dead, damping)
        if damping >= _MAX_DAMPING:
            raise MaskLLMError(f"{name}: its inputs' Hessian has no Cholesky factor; it is not positive semi-definite")
        damping *= 10
        logger.warning("%s: Hessian is rank-deficient; damping raised to %g of its mean diagonal", name, damping)


def sparsegpt(
    weight: torch.Tensor, factor: HessianFactor, sparsity: Sparsity, removed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sweep `weight` [out, in] from left to right; returns the mask, bool [out, in], and the updated weight [out, in].

    The sweep and the updated weight are fp32, or fp64 if `weight` is, so a weight that no update moves keeps its value.

    In each block of M columns, the mask keeps the N largest W^2 / diag(upper)^2 of each row. It is chosen when the sweep reaches
    the block, so W includes the updates from all columns before. With a share instead of a pattern, the mask is chosen for 128
    columns of all rows at once. Removed weights are 0 in the updated weight. Those of `removed`, bool [out, in], go before all others.
    Raises MaskLLMError if the pattern does not fit.
    """
    check_sparsity(sparsity)
    out_features, in_features = weight.shape
    if isinstance(sparsity, Pattern):
        sparsity.check_divides(in_features, "weight")
        step = sparsity.m
    else:
        step = _UNSTRUCTURED_STEP
    width = BLOCK_SIZE // step * step

    # Work on the transpose, so that a column is contiguous.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    columns = weight.t().to(dtype).clone(memory_format=torch.contiguous_format)
    whole = factor.upper.to(dtype)
    columns[factor.dead] = 0
    gone = None if removed is None else removed.t()
    keep = torch.empty(in_features, out_features, dtype=torch.bool, device=weight.device)
    for start in range(0, in_features, width):
        end = min(start + width, in_features)
        block, block_keep = columns[start:end], keep[start:end]
        upper = whole[start:end, start:end]
        diagonal = upper.diagonal().unsqueeze(1)
        errors = torch.empty_like(block)
        if not isinstance(sparsity, Pattern):
            scores = (block / diagonal).square()
            if gone is not None:
                scores.masked_fill_(gone[start:end], -1)
            block_keep.copy_(keep_of_all(scores.t(), sparsity).t())
        for low in range(0, end - start, step):
            high = min(low + step, end - start)
            if isinstance(sparsity, Pattern):
                scores = (block[low:high] / diagonal[low:high]).square()
                if gone is not None:
                    scores.masked_fill_(gone[start + low : start + high], -1)
                block_keep[low:high] = keep_of_each_block(scores.t(), sparsity).t()
            of_errors = ~block_keep[low:high] / diagonal[low:high]
            for column in range(low, high):
                torch.mul(block[column], of_errors[column - low], out=errors[column])
                if column + 1 < high:
                    block[column + 1 : high].addr_(upper[column, column + 1 : high], errors[column], alpha=-1)
            block[high:].addmm_(upper[low:high, high:].t(), errors[low:high], alpha=-1)
        columns[end:].addmm_(whole[start:end, end:].t(), errors, alpha=-1)
    columns.masked_fill_(~keep, 0)
    return keep.t().contiguous(), columns.t().contiguous()
