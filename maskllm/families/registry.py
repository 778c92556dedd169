"""The model families by the name Hugging Face gives them (`model_type`); a new family is one module and one line here."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

from maskllm.families import gpt2, llama, nemotron
from maskllm.families.hf_config import HFConfig
from maskllm.families.mapping import Mapping
from maskllm.families.model_config import ModelConfig
from maskllm.files import read_json_object

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "llama": llama, "nemotron": nemotron}
"""Each module has `read_config`, `parameter_map`, `BASE_PREFIX`, `TIED_COPIES` and `DERIVED_BUFFERS`."""

_REFUSED = {
    "quantization_config": "quantized weights",
    "auto_map": "code of its own",
    "sliding_window": "sliding-window attention",
}


def read_model_config(path: Path) -> ModelConfig:
    """The architecture in a Hugging Face `config.json`.

    Raises MaskLLMError that names the file and the key where the family or one of its features is not supported.
    """
    hf = HFConfig(read_json_object(path), str(path))
    model_type = hf.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise hf.error(f"model_type {model_type!r} is not supported, only {', '.join(map(repr, sorted(FAMILIES)))}")
    for key, meaning in _REFUSED.items():
        if hf.has(key):
            raise hf.error(f"{key} ({meaning}) is not supported")
    return FAMILIES[model_type].read_config(hf)


def parameter_map(config: ModelConfig) -> list[Mapping]:
    """Every tensor of the model and where its rows come from, in the order of the forward pass."""
    return FAMILIES[config.model_type].parameter_map(config)


def base_prefix(config: ModelConfig) -> str:
    """What the names of all Hugging Face tensors but the output layer's start with; checkpoints of the bare base model lack it."""
    return FAMILIES[config.model_type].BASE_PREFIX


def tied_copies(config: ModelConfig) -> dict[str, str]:
    """Names of Hugging Face tensors that are copies of others in this model, and of those others."""
    return FAMILIES[config.model_type].TIED_COPIES if config.tie_word_embeddings else {}


def is_derived_buffer(name: str, config: ModelConfig) -> bool:
    """Whether the Hugging Face tensor `name` follows from the config and needs no conversion."""
    return re.fullmatch(FAMILIES[config.model_type].DERIVED_BUFFERS, name) is not None
