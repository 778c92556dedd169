"""The losses of a language model's output, in chunks of tokens. The logits of all tokens never exist at once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from maskllm.masking.distillation import MAX_CHUNK_LOGITS, shifted_divergence

_PADDING = -1e30
"""The logits of the vocabulary's padding. They are finite, so that their product with a probability of 0 is 0."""


@dataclass(frozen=True)
class LossTerms:
    """How the terms of a token's loss are weighted."""

    ce: float = 1.0
    """The weight of the cross-entropy with the label."""
    kl: float = 0.0
    """The weight of T^2 * KL(teacher || student)."""
    temperature: float = 1.0
    """T. Both distributions are softmax(logits / T)."""


CROSS_ENTROPY = LossTerms()
"""The cross-entropy alone."""


class Losses(NamedTuple):
    """The losses of a micro-batch."""

    mean: torch.Tensor
    """fp32 scalar: the weighted sum of the terms, a mean over the tokens. It alone has a gradient."""
    cross_entropy: torch.Tensor
    """fp32, one for each token: [tokens] from `linear_losses`, [batch, sequence] from a model."""
    kl: torch.Tensor
    """T^2 * KL(teacher || student) in the same shape; all 0 without a teacher."""


def softcap(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(scores / cap), which keeps scores between -cap and cap (arXiv 2408.00118, section 2); `scores` if cap is None."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


class _LinearLosses(torch.autograd.Function):
    """The losses of `hidden @ weight.T`, in chunks of tokens. The vocabulary is split over the tensor-parallel ranks.

    The gradient of a token's loss with respect to its logits s is ce * (softmax(s) - one-hot) + kl * T * (softmax(s / T) -
    softmax(t / T)), with the teacher's logits t. If logits are soft-capped, it is multiplied by the slope of the cap,
    1 - (capped logit / cap)^2. The forward pass computes the gradients of `hidden` and `weight` from it while the chunk's logits
    exist, and the backward pass only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        tp_group: dist.ProcessGroup,
        vocab_size: int,
        cap: float | None,
        terms: LossTerms,
        teacher: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = weight.shape[0]
        first = tp_group.rank() * rows
        ce, kl = torch.zeros(2, hidden.shape[0], dtype=torch.float32, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if need_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        step = max(1, MAX_CHUNK_LOGITS // rows)
        if teacher is not None:
            step = max(1, 2 * MAX_CHUNK_LOGITS // rows // (4 + (cap is not None) + (terms.temperature != 1)))
        for start in range(0, hidden.shape[0], step):
            tokens = slice(start, start + step)
            logits = slope = theirs = of_kl = probabilities = of_logits = None  # free those of the chunk before

            def logits_of(states: torch.Tensor, matrix: torch.Tensor, tokens: slice = tokens) -> torch.Tensor:
                return softcap((states[tokens] @ matrix.t()).float(), cap)

            logits = logits_of(hidden, weight)
            slope = 1 - (logits / cap).square() if cap is not None and (need_hidden or need_weight) else None
            _shift(logits, vocab_size - first, tp_group)
            local = labels[tokens, None] - first
            inside = (local >= 0) & (local < rows)
            local = local.clamp(0, rows - 1)
            target = logits.gather(1, local).mul_(inside)
            if teacher is not None:
                theirs = _shift(logits_of(*teacher), vocab_size - first, tp_group)
                kl[tokens], of_kl = shifted_divergence(
                    logits,
                    theirs,
                    terms.temperature,
                    functools.partial(_sum_over_ranks, tp_group=tp_group),
                    needs_gradient=need_hidden or need_weight,
                )
            probabilities = logits.exp_()
            target, total = _sum_over_ranks([target, probabilities.sum(-1, keepdim=True)], tp_group)
            ce[tokens] = (total.log() - target).squeeze(1)
            if not (need_hidden or need_weight):
                continue
            probabilities /= total
            probabilities.scatter_add_(1, local, -inside.to(probabilities.dtype))
            if terms.ce != 1:
                probabilities *= terms.ce
            if of_kl is not None:
                probabilities.add_(of_kl, alpha=terms.kl)
            if slope is not None:
                probabilities *= slope
            of_logits = probabilities.to(weight.dtype)
            if need_hidden:
                of_hidden[tokens] = of_logits @ weight
            if need_weight:
                of_weight += of_logits.t() @ hidden[tokens]
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.tokens, ctx.weight_dtype = hidden.shape[0], weight.dtype
        losses = ce if terms.ce == 1 else terms.ce * ce
        if teacher is not None:
            losses = losses + terms.kl * kl
        ctx.mark_non_differentiable(ce, kl)
        return losses.mean(), ce, kl

    @staticmethod
    def backward(ctx: Any, grad_mean: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        scale = grad_mean / ctx.tokens
        if of_hidden is not None:
            of_hidden = of_hidden * scale.to(of_hidden.dtype)
        if of_weight is not None:
            of_weight = (of_weight * scale).to(ctx.weight_dtype)
        return of_hidden, of_weight, *[None] * 6


def _shift(logits: torch.Tensor, in_vocabulary: int, tp_group: dist.ProcessGroup) -> torch.Tensor:
    """Mark the columns from `in_vocabulary` on as padding, and subtract each row's maximum over all ranks, in place."""
    logits[:, max(0, in_vocabulary) :] = _PADDING
    maximum = logits.amax(-1, keepdim=True)
    if tp_group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
    return logits.sub_(maximum)


def _sum_over_ranks(parts: list[torch.Tensor], tp_group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Sums over all ranks, of tensors of one shape."""
    if tp_group.size() == 1:
        return parts
    joined = torch.cat(parts)
    dist.all_reduce(joined, group=tp_group)
    return list(joined.chunk(len(parts)))


def linear_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    cap: float | None = None,
    *,
    terms: LossTerms = CROSS_ENTROPY,
    teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Losses:
    """The loss of each token: cross-entropy and, with a teacher, the divergence from its predictions (arXiv 2310.06927, section 3).

    Args:
        hidden: [tokens, hidden size], the same on every rank of `tp_group`. Each rank computes its part of the gradient; the
            sum over the ranks is the gradient.
        weight: [(vocabulary + padding) / ranks, hidden size], this rank's rows of the output matrix.
        labels: int64 [tokens].
        vocab_size: The size of the vocabulary. The rows of the whole output matrix after it are padding, which the softmax leaves out.
        cap: the soft cap of the logits (`softcap`).
        terms: how the terms are weighted.
        teacher: the teacher's `hidden` and `weight`, without gradients.
    """
    return Losses(*_LinearLosses.apply(hidden, weight, labels, tp_group, vocab_size, cap, terms, teacher))
