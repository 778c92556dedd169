"""The model families, by the name that Hugging Face gives them (`model_type`).

To add a family, write one module in this folder and add it to FAMILIES. `Family` says what the module must hold.
CONTRIBUTING.md ("How to add a model family") names examples and lists the tests.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from maskllm.families import gemma2, gemma3, gpt2, llama, mistral, nemotron, phi3, qwen2, qwen3
from maskllm.families.hf_config import HFConfig
from maskllm.families.mapping import Mapping
from maskllm.families.model_config import ModelConfig
from maskllm.files import read_json_object


class Family(Protocol):
    """What the module of a family holds."""

    BASE_PREFIX: str
    """The start of all Hugging Face tensor names except the output layer's. Checkpoints of the base model alone lack it."""
    TIED_COPIES: dict[str, str]
    """Tensors that a checkpoint with tied embeddings may hold a second time: the copy's name -> the original's name."""
    DERIVED_BUFFERS: str
    """A regular expression that matches the names of tensors that the config determines. They are not converted."""

    def read_config(self, hf: HFConfig) -> ModelConfig:
        """The architecture that a `config.json` describes. Absent keys have the defaults of transformers' config class.

        Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
        """

    def parameter_map(self, config: ModelConfig) -> list[Mapping]:
        """Every tensor of the model and the Hugging Face tensors that it is made of, in the order of the forward pass.

        `maskllm/families/mapping.py` has the kinds of mapping, `maskllm/families/linears.py` Megatron's names of the masked
        linears.
        """


FAMILIES: dict[str, Family] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "llama": llama,
    "mistral": mistral,
    "nemotron": nemotron,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
}

_NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""The keys by which a `config.json` says that its MLPs are mixtures of experts."""


def read_model_config(path: Path) -> ModelConfig:
    """The architecture in a Hugging Face `config.json`.

    Raises MaskLLMError that names the file and the key if the family or one of its features is not supported.
    """
    hf = HFConfig(read_json_object(path), str(path))
    model_type = hf.values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        reason = ""
        if any(map(hf.has, _NUMBERS_OF_EXPERTS)):
            reason = " (mixture of experts)"
        elif model_type == "gemma3":
            reason = " (models for images and text; the text models have model_type 'gemma3_text')"
        raise hf.error(f"model_type {model_type!r}{reason} is not supported, only {', '.join(map(repr, sorted(FAMILIES)))}")
    if hf.has("quantization_config"):
        raise hf.error(
            "quantization_config (quantized or compressed weights) is not supported; give the model that was quantized, or what "
            "`maskllm compress --decompress` makes of it"
        )
    return FAMILIES[model_type].read_config(hf)


def parameter_map(config: ModelConfig) -> list[Mapping]:
    """Every tensor of the model and the Hugging Face tensors that it is made of, in the order of the forward pass."""
    return FAMILIES[config.model_type].parameter_map(config)


def find_stored(names: Collection[str], config: ModelConfig) -> dict[str, str]:
    """The Hugging Face tensors of the model that are among `names`, a checkpoint's: a tensor's name -> the one it is stored under.

    As in transformers, each name may lack `Family.BASE_PREFIX`, and of tied tensors the copy alone is enough.
    """
    names = set(names)
    prefix = FAMILIES[config.model_type].BASE_PREFIX
    copies = {original: copy for copy, original in tied_copies(config).items()}
    stored = {}
    for name in (name for mapping in parameter_map(config) for name in mapping.hf):
        for place in (name, name.removeprefix(prefix), copies.get(name)):
            if place in names:
                stored[name] = place
                break
    return stored


def num_parameters(config: ModelConfig) -> int:
    """The number of parameters as Hugging Face counts them: without the vocabulary's padding, and tied embeddings once."""
    return sum(math.prod(shape) for mapping in parameter_map(config) for shape in mapping.hf_shapes(config))


def tied_copies(config: ModelConfig) -> dict[str, str]:
    """`Family.TIED_COPIES` of the model's family; empty if this model's embeddings are not tied."""
    return FAMILIES[config.model_type].TIED_COPIES if config.tie_word_embeddings else {}


def is_derived_buffer(name: str, config: ModelConfig) -> bool:
    """Whether the config determines the Hugging Face tensor `name`, which may lack `BASE_PREFIX`, so that it is not converted."""
    family = FAMILIES[config.model_type]
    return any(re.fullmatch(family.DERIVED_BUFFERS, whole) is not None for whole in (name, family.BASE_PREFIX + name))
