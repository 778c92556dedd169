"""Rotary embeddings with Hugging Face's frequencies in a Megatron model."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention

from maskllm.families.rope import Rope, rotary_frequencies


class RopeEmbedding(RotaryEmbedding):
    """Megatron's rotary embedding with the frequencies of `rope`, which may depend on the sequence length.

    `multiply_rotated_channels` does the rest: this module returns angles alone, and the attention takes their cosines and sines.
    """

    def __init__(self, rope: Rope, config: TransformerConfig, cp_group: dist.ProcessGroup) -> None:
        super().__init__(
            kv_channels=rope.dim, rotary_percent=1.0, use_cpu_initialization=config.use_cpu_initialization, cp_group=cp_group
        )
        self.rope = rope

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """The angles of a sequence of `max_seq_len` tokens, in radians, fp32 [max_seq_len, rope.dim / 2]."""
        self.inv_freq = rotary_frequencies(self.rope, max_seq_len).to(self.inv_freq.device)
        return super().get_freqs_non_repeated(max_seq_len, offset)


class RopeEmbeddingByKind(RopeEmbedding):
    """The angles of two kinds of layers: those without a window, and those with one, which rotate by `local`.

    Megatron hands one tensor to all layers. Here it holds the angles of both kinds, and `SelfAttentionByKind` picks its own.
    """

    def __init__(self, rope: Rope, local: Rope, config: TransformerConfig, cp_group: dist.ProcessGroup) -> None:
        super().__init__(rope, config, cp_group)
        self.local = RopeEmbedding(local, config, cp_group)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """fp32 [2, sequence, 1, 1, rope.dim]: the angles without a window, then those with one."""
        return torch.stack([super().forward(*args, **kwargs), self.local(*args, **kwargs)])


class SelfAttentionByKind(SelfAttention):
    """Megatron's self-attention with the angles of its layer's kind (`RopeEmbeddingByKind`)."""

    def forward(self, *args: Any, rotary_pos_emb: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Upstream's; `rotary_pos_emb` is fp32 [2, sequence, 1, 1, rope.dim]."""
        windowed = is_layer_window_attention(self.config.window_size, self.config.window_attn_skip_freq, self.layer_number)
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb[int(windowed)], **kwargs)


def multiply_rotated_channels(config: TransformerConfig, factor: float) -> None:
    """Let every attention made with `config` multiply the rotated channels of its queries and keys by `factor`.

    Megatron multiplies cosines and sines by (0.1 * yarn_mscale * log(yarn_rotary_scaling_factor) + 1) / (the same with
    yarn_mscale_all_dim), whatever the embedding is (`_yarn_get_concentration_factor_from_config` upstream).
    """
    if factor != 1.0:
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale = 10 * (factor - 1)
        config.yarn_mscale_all_dim = 0.0
