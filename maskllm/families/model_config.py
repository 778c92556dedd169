"""A model's architecture: what a Hugging Face `config.json` says and what Megatron Core wants to hear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from maskllm.errors import MaskLLMError
from maskllm.families.rope import Rope, rotary_frequencies


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 (arXiv 2109.08668). Upstream's `megatron.core.activations.squared_relu` is the same inside of `torch.compile`."""
    return F.relu(x).square()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation (arXiv 1606.08415, section 2), as GPT-2 and GPT-3 have it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "squared_relu": squared_relu,
    "gelu_tanh": gelu_tanh,
}
"""The activations of an MLP by the names that `ModelConfig.activation` may have."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer whose layers are norm, attention, norm, MLP; sizes are in elements."""

    model_type: str
    """The Hugging Face name of the family."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads (grouped-query attention); equal to `num_attention_heads` without grouping."""
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    normalization: str
    """RMSNorm or LayerNorm (which has a bias)."""
    zero_centered_norm: bool
    """Whether a norm multiplies by 1 + its weight ("LayerNorm1P")."""
    norm_epsilon: float
    activation: str
    """Of the MLP, a key of ACTIVATIONS."""
    gated_mlp: bool
    """Whether the MLP's activation multiplies a second projection (SwiGLU)."""
    rope: Rope | None
    """Rotary position embeddings; None where positions are learned and added to the word embeddings."""
    tie_word_embeddings: bool
    add_bias: bool
    """Whether every linear of a layer has a bias."""

    def dimensions(self) -> dict[str, int]:
        """The sizes that tensor shapes are made of, by the names `maskllm.families.mapping` uses."""
        return {
            "vocab": self.vocab_size,
            "positions": self.max_position_embeddings,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "gate_and_up": 2 * self.ffn_hidden_size,
            "heads": self.num_attention_heads * self.head_dim,
            "qkv": (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim,
        }

    def check_tensor_parallel(self, size: int) -> None:
        """Raise MaskLLMError where `size` tensor-parallel ranks cannot share this model evenly (nothing is padded)."""
        for what, value in (
            ("vocabulary", self.vocab_size),
            ("number of attention heads", self.num_attention_heads),
            ("number of key-value heads", self.num_query_groups),
            ("MLP width", self.ffn_hidden_size),
        ):
            if value % size:
                raise MaskLLMError(
                    f"tensor-model-parallel size {size} does not divide the model's {what}, {value}; choose a size that does"
                )


def transformer_config(model: ModelConfig, *, params_dtype: torch.dtype, **overrides: Any) -> TransformerConfig:
    """The Megatron `TransformerConfig` of `model`, with parameters in `params_dtype` left uninitialized (they are loaded).

    `overrides` are further `TransformerConfig` fields: parallel sizes, sequence parallelism, recomputation. Raises MaskLLMError
    where the tensor-parallel size does not divide the model.
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
        "add_bias_linear": model.add_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": params_dtype,
        "bf16": params_dtype is torch.bfloat16,
        "fp16": params_dtype is torch.float16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "perform_initialization": False,
        # One checkpoint key a layer (decoder.layers.3.mlp...) instead of a stack of all layers, so that tensors stream one by one.
        "hetereogenous_dist_checkpoint": True,
        # Frozen weights have no gradients to accumulate, attention has its own softmax, and the others come from Apex and Transformer
        # Engine, which are not required here.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    return TransformerConfig(**(fields | overrides))


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
        "vocab_size": model.vocab_size,
        "max_sequence_length": model.max_position_embeddings,
        "share_embeddings_and_output_weights": model.tie_word_embeddings,
        **positions,
    }


def set_rotary_frequencies(gpt_model: GPTModel, model: ModelConfig) -> None:
    """Give a freshly built `gpt_model` the frequencies of `model`, if it has rotary embeddings.

    Megatron's own `rope_scaling` argument fixes all factors but one to those of LLaMA 3.1; setting the frequencies supports any.
    """
    if model.rope is not None:
        rotary = gpt_model.rotary_pos_emb
        rotary.inv_freq = rotary_frequencies(model.rope).to(rotary.inv_freq.device)
