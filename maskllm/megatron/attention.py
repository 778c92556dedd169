"""Core attention over `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch.utils.checkpoint import checkpoint

from maskllm.megatron.loss import softcap
from maskllm.megatron.transformer_config import FamilyTransformerConfig


class SDPACoreAttention(MegatronModule):
    """Causal attention by torch's fused kernels, which do not store the scores. It replaces upstream's `DotProductAttention`.

    `config.window_size` and `config.window_attn_skip_freq` say which layers have a sliding window. The fused kernels have no
    soft-capping of scores (`config.attention_softcap`), so `_softcapped_attention` computes it.

    Raises ValueError if the mask type is not causal, because every supported model family is causal.
    """

    def __init__(
        self,
        config: FamilyTransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"layer {layer_number}: attention mask type {attn_mask_type}, wanted causal")
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.softcap = config.attention_softcap

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **_: object
    ) -> torch.Tensor:
        """Compute the attention of this tensor-parallel rank's heads.

        Args:
            query: [sequence, batch, heads, head size].
            key, value: [sequence, batch, query groups, head size].
            attention_mask: ignored; the mask is causal, with the layer's sliding window.

        Returns:
            [sequence, batch, heads * head size].
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        sequence = query.shape[2]
        mask = None if self.window is None or self.window >= sequence else _window_mask(sequence, self.window, query.device)
        if self.softcap is not None:
            mask = _window_mask(sequence, sequence, query.device) if mask is None else mask
            context = _softcapped_attention(query, key, value, mask, scale=self.softmax_scale, cap=self.softcap)
            return context.permute(2, 0, 1, 3).flatten(2)
        if query.is_cuda and query.shape[1] != key.shape[1] and (mask is not None or query.dtype is torch.float32):
            # No fused CUDA kernel of torch supports grouped queries in fp32 or with a mask, and the unfused one stores the scores.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def _window_mask(sequence: int, window: int, device: torch.device) -> torch.Tensor:
    """Which tokens each token attends to: the last `window`, itself included. Bool [sequence, sequence]."""
    causal = torch.ones(sequence, sequence, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)


def _softcapped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, *, scale: float | None, cap: float
) -> torch.Tensor:
    """Attention with soft-capped scores, as [batch, heads, sequence, head size].

    Only the scores of one query group exist at a time, and the backward pass computes them again.

    `query` is [batch, heads, sequence, head size], `key` and `value` [batch, query groups, sequence, head size], `mask` is bool
    [sequence, sequence].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def one_group(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = softcap(query @ key.transpose(-2, -1) * scale, cap)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value

    groups = key.shape[1]
    parts = zip(query.chunk(groups, 1), key.chunk(groups, 1), value.chunk(groups, 1), strict=True)
    return torch.cat([checkpoint(one_group, *part, use_reentrant=False, preserve_rng_state=False) for part in parts], 1)
