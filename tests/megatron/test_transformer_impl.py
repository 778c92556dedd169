"""The modules that each `--transformer-impl` puts into a layer."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.transformer.transformer_config import TransformerConfig

from maskllm.environment.optional_parts import OptionalPart
from maskllm.megatron.attention import SDPACoreAttention
from maskllm.megatron.linears import MaskedColumnParallelLinear, MaskedRowParallelLinear
from maskllm.megatron.norm import LocalNorm
from maskllm.megatron.spec import masked_layer_spec
from maskllm.megatron.transformer_config import FamilyTransformerConfig


@pytest.mark.parametrize(
    ("name", "norm", "attention"),
    [("local", LocalNorm, SDPACoreAttention), ("transformer_engine", TENorm, TEDotProductAttention)],
    ids=["local", "transformer_engine"],
)
def test_both_implementations_have_masked_linears(name, norm, attention):
    """Megatron defines its Transformer Engine modules even if the package is not installed."""
    config = FamilyTransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, qk_layernorm=True)
    layer = masked_layer_spec(config, name).submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is norm
    assert layer.self_attention.submodules.q_layernorm is layer.self_attention.submodules.k_layernorm is norm
    assert layer.self_attention.submodules.core_attention is attention
    config.attention_softcap = 50.0
    assert masked_layer_spec(config, name).submodules.self_attention.submodules.core_attention is SDPACoreAttention
    assert layer.self_attention.submodules.linear_qkv is layer.mlp.submodules.linear_fc1 is MaskedColumnParallelLinear
    assert layer.self_attention.submodules.linear_proj is layer.mlp.submodules.linear_fc2 is MaskedRowParallelLinear


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="Transformer Engine is installed here")
@pytest.mark.parametrize(
    ("normalization", "zero_centered", "kind"),
    [("RMSNorm", False, "FusedRMSNorm"), ("LayerNorm", False, "FusedLayerNorm"), ("LayerNorm", True, "ZeroCenteredLayerNorm")],
)
def test_local_norms_are_apexs_if_apex_can_be_used(normalization, zero_centered, kind, monkeypatch):
    """torch's norms stand in for Apex's fused ones, which need a CUDA device."""
    monkeypatch.setattr("maskllm.environment.optional_parts.apex", lambda: OptionalPart("apex", "", "0.1", None))
    module = types.ModuleType("apex.normalization")
    module.FusedRMSNorm = type("FusedRMSNorm", (torch.nn.RMSNorm,), {})
    module.FusedLayerNorm = type("FusedLayerNorm", (torch.nn.LayerNorm,), {})
    monkeypatch.setitem(sys.modules, "apex.normalization", module)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, normalization=normalization, use_cpu_initialization=True,
        layernorm_zero_centered_gamma=zero_centered, params_dtype=torch.bfloat16,
    )  # fmt: skip
    norm = LocalNorm(config, 8, eps=1e-6)
    assert (type(norm).__name__, norm.eps, norm.weight.dtype) == (kind, 1e-6, torch.bfloat16)
