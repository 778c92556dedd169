"""The Qwen2 family (Qwen1.5 to Qwen2.5, QwQ): LLaMA's architecture, with biases in the query, key and value projections."""

from __future__ import annotations

from typing import Any

from maskllm.families.hf_config import HFConfig
from maskllm.families.llama import BASE_PREFIX, DERIVED_BUFFERS, TIED_COPIES, parameter_map, read_blocks, read_sizes
from maskllm.families.model_config import ModelConfig
from maskllm.families.rope import read_rope
from maskllm.families.windows import read_windows

__all__ = ["BASE_PREFIX", "DERIVED_BUFFERS", "TIED_COPIES", "parameter_map", "read_config"]


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "qwen2"; absent keys have the defaults of `transformers.Qwen2Config`.

    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    return ModelConfig(
        model_type="qwen2",
        qkv_bias=True,
        proj_bias=False,
        mlp_bias=False,
        **read_shared(hf, read_sizes(hf, max_position_embeddings=32768, num_key_value_heads=32)),
    )


def read_shared(hf: HFConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig` that Qwen2 and Qwen3 share, with the fields `sizes`. Raises MaskLLMError as `read_config` does."""
    window = None
    if hf.boolean("use_sliding_window", default=False):
        window = hf.nullable(hf.integer, "sliding_window", default=4096)
    first_windowed = hf.values.get("max_window_layers", 28)
    if not isinstance(first_windowed, int) or isinstance(first_windowed, bool):
        raise hf.error(f"max_window_layers is {first_windowed!r}; wanted an integer")
    return {
        "rope": read_rope(hf, head_dim=sizes["head_dim"], max_position_embeddings=sizes["max_position_embeddings"]),
        **read_windows(hf, sizes["num_layers"], window=window, default=lambda layer: layer >= first_windowed),
        **read_blocks(hf),
        **sizes,
    }
