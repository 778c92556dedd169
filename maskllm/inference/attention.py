"""The attention of compressed models: transformers' `sdpa`, in which one token at a time takes less time on a CPU.

A new token has one query a head. torch makes a product of each, and in bf16 one such product can take many times as long as reading its
keys. Beside compressed linears that is a large part of a token's time (docs/benchmarks/runtime.md). Here the queries of all heads that
share their keys are one product, as transformers has it if there is a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from maskllm.environment.cpu_speed import computes_natively

ATTENTION = "maskllm_sdpa"
"""The name of this attention in transformers' `AttentionInterface`."""
_NATIVE_BF16 = computes_natively(torch.bfloat16)  # a constant, as torch.compile wants it


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(query key^T * scaling) value for each head, as transformers calls it.

    Args:
        module: the attention layer.
        query: [batch, heads, tokens, head size].
        key, value: [batch, key heads, all tokens, head size]; as many heads in turn share a key head as there are for each.
        attention_mask: [batch, 1 or heads, tokens, all tokens], bool (True: attend) or added to the scores; None for no mask beside the
            causal one.
        scaling: default 1 / sqrt(head size).
        options: others of transformers', such as `dropout`.

    Returns [batch, tokens, heads, head size], and None for the weights.
    """
    plain = options.get("position_bias") is None and not any(
        options.get(name) for name in ("dropout", "softcap", "output_attentions")
    )
    if query.shape[2] != 1 or query.device.type != "cpu" or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    batch, heads, _, size = query.shape
    key_heads = key.shape[1]
    queries = query.reshape(batch, key_heads, heads // key_heads, size)
    if attention_mask is not None and attention_mask.shape[1] == heads:
        attention_mask = attention_mask.reshape(batch, key_heads, heads // key_heads, -1)
    if heads == key_heads and query.dtype == torch.bfloat16 and _NATIVE_BF16:
        scores = (queries @ key.transpose(2, 3)).float() * (size**-0.5 if scaling is None else scaling)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            scores.masked_fill_(~attention_mask, torch.finfo(scores.dtype).min)
        elif attention_mask is not None:
            scores += attention_mask
        result = torch.softmax(scores, -1).to(value.dtype) @ value
    else:
        result = nn.functional.scaled_dot_product_attention(queries, key, value, attn_mask=attention_mask, scale=scaling)
    return result.reshape(batch, 1, heads, size), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_attention(model: PreTrainedModel) -> None:
    """Give `model` this attention in the place of `sdpa`, if it takes its attention from transformers' table."""
    _replace(model, "sdpa", ATTENTION)


def restore_attention(model: PreTrainedModel) -> None:
    """Undo `use_attention`."""
    _replace(model, ATTENTION, "sdpa")


def _replace(model: PreTrainedModel, before: str, after: str) -> None:
    """`PreTrainedModel.set_attn_implementation`, but only for the parts of the model that have the attention `before`."""
    for module in model.modules():
        settable = isinstance(module, PreTrainedModel) and module._can_set_attn_implementation()
        if settable and module.config._attn_implementation == before:
            module.config._attn_implementation_internal = after
