"""The masked weight of a layer: draw a mask from its logits and apply it, in one pass forward and one backward (MaskLLM, section
3.2).

The two operators are registered with `torch.library`: schema, shapes for tracing, autograd, and the PyTorch reference for devices
without a compiled kernel.
"""

from __future__ import annotations

import math

import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import reference
from maskllm.ops.extension import kernels, warn_if_reference
from maskllm.ops.noise import NoiseKey, ShardMap
from maskllm.patterns import Pattern

_KEY = "int n, int m, int key, int sample, int[] shard"
_DRAW = "float scale, float temperature, float weight_reg, bool hard"

torch.library.define(
    "maskllm::masked_weight", f"(Tensor weight, Tensor mask_logits, {_KEY}, {_DRAW}, bool with_stats) -> (Tensor, Tensor)"
)
torch.library.define(
    "maskllm::masked_weight_backward",
    f"(Tensor grad, Tensor weight, Tensor mask_logits, {_KEY}, {_DRAW}, Tensor(a!) grad_logits, bool accumulate, "
    "Tensor(b!)? grad_weight) -> ()",
)


def masked_weight(
    weight: torch.Tensor,
    mask_logits: torch.Tensor,
    *,
    pattern: Pattern,
    key: NoiseKey,
    scale: float,
    temperature: float,
    weight_reg: float = 0.0,
    hard: bool = False,
    stats: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight * m` for a mask `m` drawn from `mask_logits`: `y = softmax((scale * l + g) / temperature)`, `m = y @ S`.

    Args:
        weight: [out, in], bf16, fp16 or fp32, contiguous.
        mask_logits: [out, in / M, C(M, N)], fp32 or bf16, contiguous.
        pattern: N:M, whose candidate matrix is `S`.
        key: determines the Gumbel noise `g`. The same key draws the same mask, so the backward pass redraws it and autograd saves
            only the two inputs.
        scale, temperature: kappa and tau of the paper.
        weight_reg: lambda of the sparse weight regularization. Gradients are those of the loss minus
            `weight_reg * ||weight * m||^2`.
        hard: use the most probable candidate's row instead of `m`. The gradient is still the soft mask's (straight-through).
        stats: fp32 [2] on the weight's device. This call adds two sums to it: the squares of the masked weight, and over the blocks
            the largest entry of `softmax(scale * l)`.

    Returns:
        [out, in] in `weight`'s dtype. If `mask_logits` has a `main_grad` (fp32, or the logits' dtype), the backward pass adds the
        gradient to it and sets `mask_logits.grad_added_to_main_grad`, as Megatron's fused kernels do. Otherwise the gradient goes
        to `.grad`.

    Raises:
        MaskLLMError: shapes, dtypes, devices, strides, the temperature or the scale do not fit.
    """
    _check_inputs(weight, mask_logits, pattern, scale, temperature, stats)
    warn_if_reference(weight.device.type)
    masked, sums = torch.ops.maskllm.masked_weight(
        weight,
        mask_logits,
        pattern.n,
        pattern.m,
        key.signed_key,
        key.sample,
        key.shard.numbers(),
        float(scale),
        float(temperature),
        float(weight_reg),
        hard,
        stats is not None,
    )
    if stats is not None:
        stats.add_(sums)
    return masked


def _check_inputs(weight, mask_logits, pattern, scale, temperature, stats) -> None:
    pattern.require_learnable()
    wanted = None
    if weight.dim() == 2 and weight.shape[1] % pattern.m == 0:
        wanted = (weight.shape[0], weight.shape[1] // pattern.m, pattern.num_candidates)
    if wanted is None or tuple(mask_logits.shape) != wanted:
        raise MaskLLMError(
            f"masked_weight: weight {list(weight.shape)} and mask_logits {list(mask_logits.shape)}: for pattern {pattern} wanted "
            f"[out, in] with in a multiple of {pattern.m} and [out, in / {pattern.m}, {pattern.num_candidates}]"
        )
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise MaskLLMError(f"masked_weight: weight is {weight.dtype}; wanted bfloat16, float16 or float32")
    if mask_logits.dtype not in (torch.bfloat16, torch.float32):
        raise MaskLLMError(f"masked_weight: mask_logits is {mask_logits.dtype}; wanted float32 or bfloat16")
    if weight.device != mask_logits.device:
        raise MaskLLMError(f"masked_weight: weight is on {weight.device} and mask_logits on {mask_logits.device}")
    if not (weight.is_contiguous() and mask_logits.is_contiguous()):
        raise MaskLLMError("masked_weight: weight and mask_logits must be contiguous; call .contiguous() on them first")
    if not (math.isfinite(temperature) and temperature > 0 and math.isfinite(scale)):
        raise MaskLLMError(f"masked_weight: temperature {temperature} and scale {scale}; wanted a positive and a finite number")
    if stats is not None and (stats.dtype != torch.float32 or stats.shape != (2,)):
        raise MaskLLMError(f"masked_weight: stats is {stats.dtype} {list(stats.shape)}; wanted float32 [2]")


def _noise_key(key: int, sample: int, shard: list[int]) -> NoiseKey:
    return NoiseKey(key % (1 << 64), sample, ShardMap(*shard))


@torch.library.impl("maskllm::masked_weight", "CompositeExplicitAutograd")
def _forward_reference(weight, mask_logits, n, m, key, sample, shard, scale, temperature, weight_reg, hard, with_stats):
    noise = _noise_key(key, sample, shard)
    return reference.forward(weight, mask_logits, Pattern(n, m), noise, scale, temperature, hard, with_stats)


@torch.library.impl("maskllm::masked_weight_backward", "CompositeExplicitAutograd")
def _backward_reference(
    grad,
    weight,
    mask_logits,
    n,
    m,
    key,
    sample,
    shard,
    scale,
    temperature,
    weight_reg,
    hard,
    grad_logits,
    accumulate,
    grad_weight,
):
    of_logits, of_weight = reference.backward(
        grad, weight, mask_logits, Pattern(n, m), _noise_key(key, sample, shard), scale, temperature, weight_reg, hard
    )
    if accumulate:
        grad_logits.add_(of_logits.view_as(grad_logits))
    else:
        grad_logits.copy_(of_logits)
    if grad_weight is not None:
        grad_weight.copy_(of_weight)


@torch.library.register_fake("maskllm::masked_weight")
def _forward_shapes(weight, mask_logits, n, m, key, sample, shard, scale, temperature, weight_reg, hard, with_stats):
    return torch.empty_like(weight), weight.new_empty(2 if with_stats else 0, dtype=torch.float32)


@torch.library.register_fake("maskllm::masked_weight_backward")
def _backward_shapes(*_args, **_kwargs) -> None:
    return None


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.draw = inputs[2:-1]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _grad_stats):
    weight, mask_logits = ctx.saved_tensors
    needs_weight, needs_logits = ctx.needs_input_grad[:2]
    main_grad = getattr(mask_logits, "main_grad", None) if needs_logits else None
    grad_logits = torch.empty_like(mask_logits) if main_grad is None else main_grad
    grad_weight = torch.empty_like(weight) if needs_weight else None
    torch.ops.maskllm.masked_weight_backward(
        grad.contiguous(), weight, mask_logits, *ctx.draw, grad_logits, main_grad is not None, grad_weight
    )
    if main_grad is not None:
        mask_logits.grad_added_to_main_grad = True
        grad_logits = None
    return grad_weight, grad_logits, *[None] * (len(ctx.draw) + 1)


torch.library.register_autograd("maskllm::masked_weight", _backward, setup_context=_setup_context)

kernels()  # registers the compiled operators for their devices
