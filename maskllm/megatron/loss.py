"""Language-model loss over a frozen output matrix. The logits of all tokens never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

MAX_CHUNK_LOGITS = 1 << 25
"""The largest number of logits computed at once: 128 MiB in fp32."""


def softcap(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(scores / cap), which keeps scores between -cap and cap (arXiv 2408.00118, section 2); `scores` if cap is None."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


class _FrozenLinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `hidden @ weight.T`, in chunks of tokens. The vocabulary is split over the tensor-parallel ranks.

    The gradient of a token's loss with respect to its hidden state is (softmax - one-hot) @ weight. If logits are soft-capped, each
    factor of the product with `weight` is multiplied by the slope of the cap, 1 - (capped logit / cap)^2. The backward pass needs
    nothing else, because the weight is frozen. So the forward pass computes this gradient while the chunk's logits exist, and
    the backward pass only scales it.
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
    ) -> torch.Tensor:
        vocabulary = weight.shape[0]
        first = tp_group.rank() * vocabulary
        parallel = tp_group.size() > 1
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        step = max(1, MAX_CHUNK_LOGITS // vocabulary)
        for start in range(0, hidden.shape[0], step):
            tokens = slice(start, start + step)
            logits = softcap((hidden[tokens] @ weight.t()).float(), cap)
            slope = 1 - (logits / cap).square() if cap is not None and gradient is not None else None
            logits[:, max(0, vocab_size - first) :] = -torch.inf  # padding
            maximum = logits.amax(-1, keepdim=True)
            if parallel:
                dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=tp_group)
            logits -= maximum
            local = labels[tokens, None] - first
            inside = (local >= 0) & (local < vocabulary)
            local = local.clamp(0, vocabulary - 1)
            target = logits.gather(1, local).masked_fill_(~inside, 0)  # 0 times a padding's -inf would not be a number
            probabilities = logits.exp_()
            total = probabilities.sum(-1, keepdim=True)
            if parallel:
                both = torch.cat([target, total])
                dist.all_reduce(both, group=tp_group)
                target, total = both.chunk(2)
            losses[tokens] = (total.log() - target).squeeze(1)
            if gradient is not None:
                probabilities /= total
                probabilities.scatter_add_(1, local, -inside.to(probabilities.dtype))
                if slope is not None:
                    probabilities *= slope
                gradient[tokens] = probabilities.to(weight.dtype) @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_losses.unsqueeze(1).to(gradient.dtype), None, None, None, None, None


def frozen_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    cap: float | None = None,
) -> torch.Tensor:
    """The cross-entropy loss of each token, in fp32.

    Args:
        hidden: [tokens, hidden size], the same on every rank of `tp_group`. Each rank computes its part of the gradient; the
            sum over the ranks is the gradient.
        weight: [(vocabulary + padding) / ranks, hidden size], this rank's rows of the output matrix. It gets no gradient.
        labels: int64 [tokens].
        vocab_size: The size of the vocabulary. The rows of the whole output matrix after it are padding, which the softmax leaves out.
        cap: the soft cap of the logits (`softcap`).

    Returns:
        fp32 [tokens].

    Raises:
        ValueError: if `weight` requires a gradient.
    """
    if weight.requires_grad:
        raise ValueError("frozen_linear_cross_entropy: the output matrix requires a gradient, wanted a frozen one")
    return _FrozenLinearCrossEntropy.apply(hidden, weight, labels, tp_group, vocab_size, cap)
