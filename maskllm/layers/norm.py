"""The normalization of a transformer layer, with torch's own modules."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchNorm:
    """Builds `torch.nn.RMSNorm` or `torch.nn.LayerNorm` as `config.normalization` says.

    Upstream's `WrappedTorchNorm` does the same but refuses sequence parallelism, which needs no more of a norm than a mark on
    its parameters: each rank normalizes its own part of the sequence.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> torch.nn.Module:
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype, device=device)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
