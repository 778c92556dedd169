"""A model's architecture: what a Hugging Face `config.json` says and what Megatron Core wants to hear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from maskllm.errors import MaskLLMError


@dataclass(frozen=True)
class Llama3RopeScaling:
    """The `llama3` stretch of rotary frequencies (LLaMA 3.1): long wavelengths are divided by `factor`, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with RMSNorm, rotary embeddings and a SwiGLU MLP; sizes are in elements."""

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
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    tie_word_embeddings: bool
    add_bias: bool
    """Whether every linear of a layer has a bias."""

    def dimensions(self) -> dict[str, int]:
        """The sizes that tensor shapes are made of, by the names `maskllm.models.mapping` uses."""
        return {
            "vocab": self.vocab_size,
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
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
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
        # The fused kernels come from Apex and Transformer Engine, which are not required here.
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
    return {
        "vocab_size": model.vocab_size,
        "max_sequence_length": model.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": model.rope_theta,
        "share_embeddings_and_output_weights": model.tie_word_embeddings,
    }


def rotary_frequencies(model: ModelConfig) -> torch.Tensor:
    """The angle per position of each pair of a head's channels, radians, fp32 [head_dim / 2].

    With scaling this is the formula of LLaMA 3.1 (`rope_type: llama3`): frequencies whose wavelength exceeds the original context /
    low_freq_factor are divided by `factor`, those below original context / high_freq_factor are kept, the rest interpolate.
    """
    channels = torch.arange(0, model.head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / model.rope_theta ** (channels / model.head_dim)
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


def set_rotary_frequencies(gpt_model: GPTModel, model: ModelConfig) -> None:
    """Give a freshly built `gpt_model` the frequencies of `model`.

    Megatron's own `rope_scaling` argument fixes all factors but one to those of LLaMA 3.1; setting the frequencies supports any.
    """
    rotary = gpt_model.rotary_pos_emb
    rotary.inv_freq = rotary_frequencies(model).to(rotary.inv_freq.device)
