"""The norms of a transformer layer without Transformer Engine: Apex's fused kernels, or torch's functions."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from maskllm.environment.optional_parts import uses_apex_norms


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight. The sum has the weight's dtype, as in transformers' `NemotronLayerNorm1P`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension of `input` [..., hidden size]."""
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight. The sum and the product are computed in fp32, as in transformers' `Gemma2RMSNorm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimension of `input` [..., hidden size]."""
        return F.rms_norm(input.float(), self.normalized_shape, self.weight.float() + 1, self.eps).to(input.dtype)


NORMS: dict[tuple[str, bool], type[torch.nn.Module]] = {
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): ZeroCenteredRMSNorm,
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): ZeroCenteredLayerNorm,
}
"""torch's norms. The keys are Megatron's settings `normalization` and `layernorm_zero_centered_gamma`."""


def local_norms() -> dict[tuple[str, bool], type[torch.nn.Module]]:
    """NORMS. If Apex can be used, its norms replace torch's RMSNorm and LayerNorm; they have the same parameters."""
    if not uses_apex_norms():
        return NORMS
    apex = importlib.import_module("apex.normalization")
    return NORMS | {("RMSNorm", False): apex.FusedRMSNorm, ("LayerNorm", False): apex.FusedLayerNorm}


class LocalNorm:
    """Builds the norm of `local_norms` that `config.normalization` and `config.layernorm_zero_centered_gamma` select.

    Upstream's `WrappedTorchNorm` does the same but refuses zero-centered weights and sequence parallelism. For sequence
    parallelism a norm only needs a mark on its parameters, because each rank normalizes its part of the sequence.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> torch.nn.Module:
        kind = local_norms()[config.normalization, config.layernorm_zero_centered_gamma]
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        norm = kind(hidden_size, eps=eps).to(dtype=config.params_dtype, device=device)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
