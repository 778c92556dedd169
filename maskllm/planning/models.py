"""The models that `maskllm plan` knows: built-in architectures by name, and any other from its `config.json` or checkpoint."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskllm.checkpoints.convert import MAKE_VOCAB_SIZE_DIVISIBLE_BY
from maskllm.checkpoints.reading import resolve
from maskllm.dtypes import BY_NAME
from maskllm.errors import MaskLLMError
from maskllm.families.hf_config import HFConfig
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import FAMILIES, read_model_config
from maskllm.files import read_json_object
from maskllm.huggingface.hub import find_source

_LLAMA: dict[str, Any] = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
_LLAMA_3 = _LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
_GPT: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 256000,
    "tie_word_embeddings": False,
    "activation_function": "gelu_new",
    "torch_dtype": "bfloat16",
}

BUILT_IN: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA
    | {
        "torch_dtype": "float16",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-2-13b": _LLAMA
    | {
        "torch_dtype": "float16",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-3-8b": _LLAMA_3,
    "llama-3.1-8b": _LLAMA_3 | {"max_position_embeddings": 131072},
    "nemotron-4-15b": {
        "model_type": "nemotron",
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 32,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "vocab_size": 256000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "gpt3-843m": _GPT | {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 2048},
    "gpt3-2b": _GPT | {"n_embd": 2048, "n_layer": 24, "n_head": 16, "n_positions": 2048},
    "smollm2-135m": _LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}
"""Name -> values of its `config.json`, as published.

The GPT-3 style models have GPT-3's layers (arXiv 2005.14165) and an untied vocabulary of 256000. LLaMA 3.1's stretched rotary
embeddings are left out, since they change neither memory nor time.
"""


@dataclass(frozen=True, kw_only=True)
class StoredModel(ModelConfig):
    """An architecture, with the vocabulary's padding of its Megatron checkpoint, and the dtype of the checkpoint's weights.

    Every checkpoint made from it keeps that dtype.
    """

    stored_dtype: torch.dtype


def named_model(name: str) -> StoredModel:
    """The model that `name` means: one of BUILT_IN, a Hugging Face directory or hub id, or a Megatron checkpoint.

    Raises MaskLLMError if it is none of these, or if its family is not supported.
    """
    if name in BUILT_IN:
        return config_of(BUILT_IN[name], name)
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        checkpoint = resolve(path)
        # Training that trains the layers' weights stores them in another dtype than the embeddings.
        embedding = checkpoint.tensors["embedding.word_embeddings.weight"]
        return StoredModel(**vars(checkpoint.model_config), stored_dtype=embedding.dtype)
    try:
        file = find_source(name, files=["config.json"]) / "config.json"
    except MaskLLMError as error:
        if path.exists() or path.name != name:  # a built-in name has no slash
            raise
        closest = "".join(f"; the closest is {known}" for known in difflib.get_close_matches(name.lower(), BUILT_IN, n=1))
        raise MaskLLMError(f"{error}; wanted a directory, a hub id or one of {', '.join(BUILT_IN)}{closest}") from None
    return _converted(read_model_config(file), HFConfig(read_json_object(file), str(file)))


def config_of(values: dict[str, Any], name: str = "config") -> StoredModel:
    """The model that the values of a `config.json` describe. Errors call it `name`."""
    hf = HFConfig(values, name)
    return _converted(FAMILIES[values["model_type"]].read_config(hf), hf)


def _converted(config: ModelConfig, hf: HFConfig) -> StoredModel:
    """The model as `maskllm convert` stores it."""
    return StoredModel(**vars(config.padded(MAKE_VOCAB_SIZE_DIVISIBLE_BY)), stored_dtype=_stored_dtype(hf))


def _stored_dtype(hf: HFConfig) -> torch.dtype:
    """The value of `dtype`, or of `torch_dtype` (before transformers 4.56). The default is torch's, fp32."""
    key = "dtype" if hf.has("dtype") else "torch_dtype"
    found = hf.values[key] if hf.has(key) else "float32"
    if not isinstance(found, str) or found not in BY_NAME:
        raise hf.error(f"{key} is {found!r}; wanted one of {', '.join(BY_NAME)}")
    return BY_NAME[found]
