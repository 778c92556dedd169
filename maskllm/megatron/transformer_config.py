"""What Megatron Core wants to hear about a model: `TransformerConfig` and the arguments of `GPTModel`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from maskllm.families.model_config import ModelConfig
from maskllm.megatron.rotary import RopeEmbedding, RopeEmbeddingByKind, multiply_rotated_channels


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (arXiv 2109.08668). Upstream's `megatron.core.activations.squared_relu` is the same inside of `torch.compile`."""
    return F.relu(x).square()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation (arXiv 1606.08415, section 2), as in GPT-2 and GPT-3."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "squared_relu": squared_relu,
    "gelu_tanh": gelu_tanh,
}
"""The activations of an MLP by the names that `ModelConfig.activation` may have."""


@dataclass
class FamilyTransformerConfig(TransformerConfig):
    """Megatron's config with what only some families have. `ModelConfig` explains the fields."""

    post_norms: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    local_rope: bool = False
    """Whether layers with a window have rotary embeddings of their own (`RopeEmbeddingByKind`)."""


def transformer_config(model: ModelConfig, *, params_dtype: torch.dtype, **overrides: Any) -> FamilyTransformerConfig:
    """The config of `model`, with parameters in `params_dtype` left uninitialized (they are loaded).

    `overrides` are further `TransformerConfig` fields: parallel sizes, sequence parallelism, recomputation. Raises MaskLLMError
    if the tensor-parallel size does not divide the model.
    """
    model.check_tensor_parallel(overrides.get("tensor_model_parallel_size", 1))
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "normalization": model.normalization,
        "layernorm_zero_centered_gamma": model.zero_centered_norm,
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": model.gated_mlp,
        "activation_func": ACTIVATIONS[model.activation],
        # Megatron knows two cases: all linears have biases, or QKV alone. `hold_masked_parameters` removes those that are too many.
        "add_bias_linear": model.proj_bias or model.mlp_bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "post_norms": model.post_norms,
        "attention_softcap": model.attention_softcap,
        "logit_softcap": model.logit_softcap,
        "embedding_scale": model.embedding_scale,
        "local_rope": model.local_rope is not None,
        "softmax_scale": model.attention_scale,
        "window_size": None if model.window is None else (model.window - 1, 0),
        "window_attn_skip_freq": [int(windowed) for windowed in model.windowed_layers] or None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": params_dtype,
        "bf16": params_dtype is torch.bfloat16,
        "fp16": params_dtype is torch.float16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": False,
        # One checkpoint key per layer (decoder.layers.3.mlp...) instead of one stack of all layers, so that tensors stream one by one.
        "hetereogenous_dist_checkpoint": True,
        # Frozen weights have no gradients to accumulate, attention has its own softmax, and the other fusions come from Apex and
        # Transformer Engine, which are optional here.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    config = FamilyTransformerConfig(**(fields | overrides))
    if model.rope is not None:
        multiply_rotated_channels(config, model.rope.attention_factor)
    return config


def gpt_model_arguments(model: ModelConfig) -> dict[str, Any]:
    """The keyword arguments of Megatron's `GPTModel` that the architecture fixes; `set_rotary_frequencies` does the rest."""
    positions: dict[str, Any] = {"position_embedding_type": "learned_absolute"}
    if model.rope is not None:
        positions = {
            "position_embedding_type": "rope",
            "rotary_base": model.rope.theta,
            "rotary_percent": model.rope.dim / model.head_dim,
        }
    return {
        "vocab_size": model.dimensions()["vocab"],
        "max_sequence_length": model.max_position_embeddings,
        "share_embeddings_and_output_weights": model.tie_word_embeddings,
        **positions,
    }


def set_rotary_frequencies(gpt_model: GPTModel, model: ModelConfig) -> None:
    """Give a freshly built `gpt_model` the frequencies of `model`, if it has rotary embeddings.

    Megatron's own arguments support neither all types of scaling nor all of their settings.
    """
    rest = (gpt_model.config, gpt_model.pg_collection.cp)
    if model.local_rope is not None:
        gpt_model.rotary_pos_emb = RopeEmbeddingByKind(model.rope, model.local_rope, *rest)
    elif model.rope is not None:
        gpt_model.rotary_pos_emb = RopeEmbedding(model.rope, *rest)
