"""The terms of a loss that compare a student with its teacher: predictions and hidden states (arXiv 2310.06927, section 3).

Both frames use them: `maskllm.megatron` with a vocabulary and tokens that ranks split, `maskllm.finetuning` with whole ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MAX_CHUNK_LOGITS = 1 << 25
"""The largest number of logits whose temporary fp32 copies exist at once: 128 MiB each."""

Sum = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""Sums of tensors over the ranks that split what they were computed from."""


def shifted_divergence(
    ours: torch.Tensor, theirs: torch.Tensor, temperature: float, sum_over_ranks: Sum, *, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """T^2 * KL(softmax(theirs / T) || softmax(ours / T)), [tokens], and its gradient with respect to `ours`.

    Both are fp32 logits [tokens, columns of this rank], from which each row's maximum over all ranks has been subtracted. `theirs` is
    overwritten.
    """
    if temperature != 1:
        ours, theirs = ours / temperature, theirs.div_(temperature)
    their_exp = theirs.exp()
    # The products in `vecdot` are as large as `our_exp`, so they come before it.
    dots = [torch.linalg.vecdot(their_exp, logits)[:, None] for logits in (theirs, ours)]
    our_exp = ours.exp()
    sums = [exp.sum(-1, keepdim=True) for exp in (their_exp, our_exp)]
    their_dot, our_dot, their_sum, our_sum = sum_over_ranks([*dots, *sums])
    divergence = (their_dot - our_dot) / their_sum - their_sum.log() + our_sum.log()
    if not needs_gradient:
        return temperature**2 * divergence.squeeze(1), None
    gradient = our_exp.div_(our_sum).sub_(their_exp.div_(their_sum)).mul_(temperature)
    return temperature**2 * divergence.squeeze(1), gradient


class _Divergence(torch.autograd.Function):
    """The divergence of whole rows of logits. It keeps the gradient, in the logits' dtype, instead of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
        divergence = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        step = max(1, MAX_CHUNK_LOGITS // logits.shape[1])
        for start in range(0, len(logits), step):
            tokens = slice(start, start + step)
            ours, theirs = (each[tokens].float() - each[tokens].float().amax(-1, keepdim=True) for each in (logits, target))
            divergence[tokens], of_chunk = shifted_divergence(
                ours, theirs, temperature, lambda parts: parts, needs_gradient=gradient is not None
            )
            if gradient is not None:
                gradient[tokens] = of_chunk
        ctx.save_for_backward(gradient)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None


def divergence(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL(softmax(target / T) || softmax(logits / T)), fp32 [tokens], with a gradient for `logits` alone.

    `logits` and `target`, the teacher's, are [tokens, vocabulary], of any float dtype.
    """
    return _Divergence.apply(logits, target, temperature)


def squared_sums(hidden: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """The sums of squares of `hidden - target` and of `target`, fp32 [2].

    `hidden` and `target` have one shape [..., hidden size]. `counted`, bool of that shape without its last dimension, says which tokens
    count; None for all.
    """
    difference, target = hidden.float() - target, target.float()
    if counted is not None:
        difference, target = (each.masked_fill(~counted[..., None], 0) for each in (difference, target))
    return torch.stack([difference.square().sum(), target.square().sum()])


_SMALLEST = torch.finfo(torch.float32).tiny
"""The least ||target||^2, so that states of which no token counts have the error 0 and not 0 / 0."""


class _SquareHead(torch.autograd.Function):
    """The relative squared error. It keeps the two states as they are and makes fp32 copies in the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
        squares = squared_sums(hidden, target, counted)
        ctx.save_for_backward(hidden, target, counted, squares[1])
        return squares[0] / squares[1].clamp(min=_SMALLEST)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        hidden, target, counted, square = ctx.saved_tensors
        gradient = (2 * grad / square.clamp(min=_SMALLEST)) * (hidden.float() - target)
        if counted is not None:
            gradient = gradient.masked_fill(~counted[..., None], 0)
        return gradient.to(hidden.dtype), None, None


def squarehead(hidden: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
    """SquareHead of a layer: ||hidden - target||^2 / ||target||^2 over the tokens that count, an fp32 scalar; 0 if none counts.

    The arguments are those of `squared_sums`. `hidden` alone gets a gradient; `target` are the teacher's states.
    """
    return _SquareHead.apply(hidden, target, counted)
