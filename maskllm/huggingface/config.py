"""Reading transformers' config of a model."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from maskllm.files import read_json_object


def load_config(directory: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """transformers' config of the model in `directory`, also if its `hidden_size` is not a multiple of its heads.

    Such a model is valid if the config states `head_dim`: its query projection has heads * head_dim rows. transformers refuses it
    when it makes or writes the config (`LlamaConfig.validate_architecture`), but not when it builds a model of it. So the config is
    made with a size that passes, and then gets its own.

    Raises MaskLLMError if `config.json` is not readable JSON, and what transformers raises for its contents.
    """
    values = read_json_object(directory / "config.json")
    sizes = [values.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim")]
    if "auto_map" not in values and all(isinstance(size, int) and size > 0 for size in sizes):
        hidden, heads, head_dim = sizes
        if hidden % heads:
            config = AutoConfig.for_model(**values | {"hidden_size": heads * head_dim})
            config.hidden_size = hidden
            return config
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
