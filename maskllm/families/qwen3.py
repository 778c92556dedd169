"""The Qwen3 family: LLaMA's architecture, with a norm of the queries and keys of each head."""

from __future__ import annotations

from maskllm.families.hf_config import HFConfig
from maskllm.families.llama import BASE_PREFIX, DERIVED_BUFFERS, TIED_COPIES, parameter_map, read_sizes
from maskllm.families.model_config import ModelConfig
from maskllm.families.qwen2 import read_shared

__all__ = ["BASE_PREFIX", "DERIVED_BUFFERS", "TIED_COPIES", "parameter_map", "read_config"]


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "qwen3"; absent keys have the defaults of `transformers.Qwen3Config`.

    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    attention_bias = hf.boolean("attention_bias", default=False)
    return ModelConfig(
        model_type="qwen3",
        qkv_bias=attention_bias,
        proj_bias=attention_bias,
        mlp_bias=False,
        qk_norm=True,
        **read_shared(hf, read_sizes(hf, max_position_embeddings=32768, num_key_value_heads=32, head_dim=128)),
    )
