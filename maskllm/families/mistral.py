"""The Mistral family (7B, NeMo, Small): LLaMA's architecture, with a sliding window in all layers if the config states one."""

from __future__ import annotations

from maskllm.families.hf_config import HFConfig
from maskllm.families.llama import BASE_PREFIX, DERIVED_BUFFERS, TIED_COPIES, parameter_map, read_blocks, read_sizes
from maskllm.families.model_config import ModelConfig
from maskllm.families.rope import read_rope
from maskllm.families.windows import read_window_of_all_layers

__all__ = ["BASE_PREFIX", "DERIVED_BUFFERS", "TIED_COPIES", "parameter_map", "read_config"]


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "mistral"; absent keys have the defaults of `transformers.MistralConfig`.

    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    sizes = read_sizes(hf, max_position_embeddings=131072, num_key_value_heads=8)
    return ModelConfig(
        model_type="mistral",
        rope=read_rope(hf, head_dim=sizes["head_dim"], max_position_embeddings=sizes["max_position_embeddings"]),
        qkv_bias=False,
        proj_bias=False,
        mlp_bias=False,
        **read_window_of_all_layers(hf, sizes["num_layers"], default=4096),
        **read_blocks(hf),
        **sizes,
    )
