"""Core attention over `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class SDPACoreAttention(MegatronModule):
    """Causal attention by torch's fused kernels, which do not store the scores. It replaces upstream's `DotProductAttention`.

    Raises ValueError if the mask type is not causal, because every supported model family is causal.
    """

    def __init__(
        self,
        config: TransformerConfig,
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

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **_: object
    ) -> torch.Tensor:
        """Compute the attention of this tensor-parallel rank's heads.

        Args:
            query: [sequence, batch, heads, head size].
            key, value: [sequence, batch, query groups, head size].
            attention_mask: ignored; the mask is causal.

        Returns:
            [sequence, batch, heads * head size].
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if query.is_cuda and query.dtype is torch.float32 and query.shape[1] != key.shape[1]:
            # No fused CUDA kernel of torch supports grouped queries in fp32, and the unfused one stores the scores.
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)
