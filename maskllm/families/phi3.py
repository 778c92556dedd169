"""The Phi-3 family (Phi-3, Phi-3.5, Phi-4): LLaMA's architecture, with fused projections in the Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

from maskllm.families import llama
from maskllm.families.hf_config import HFConfig
from maskllm.families.linears import FC1, PROJ, QKV
from maskllm.families.llama import BASE_PREFIX, DERIVED_BUFFERS, TIED_COPIES
from maskllm.families.mapping import Direct, Mapping, StackedQKV
from maskllm.families.model_config import ModelConfig
from maskllm.families.rope import LongRopeScaling, Rope, read_rope
from maskllm.families.windows import read_window_of_all_layers

__all__ = ["BASE_PREFIX", "DERIVED_BUFFERS", "TIED_COPIES", "parameter_map", "read_config"]

LAYER = [
    llama.INPUT_NORM,
    StackedQKV(QKV.weight, ("model.layers.*.self_attn.qkv_proj.weight",), QKV.dimensions),
    Direct(PROJ.weight, ("model.layers.*.self_attn.o_proj.weight",), PROJ.dimensions),
    llama.MLP_NORM,
    # All gate rows, then all up rows, as Megatron orders them.
    Direct(FC1.weight, ("model.layers.*.mlp.gate_up_proj.weight",), FC1.dimensions),
    llama.MLP_DOWN,
]


def parameter_map(config: ModelConfig) -> list[Mapping]:
    """Every tensor of the model, in the order of the forward pass."""
    return llama.with_ends(LAYER, config)


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "phi3"; absent keys have the defaults of `transformers.Phi3Config`.

    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    sizes = llama.read_sizes(hf, max_position_embeddings=4096)
    return ModelConfig(
        model_type="phi3",
        rope=_read_rope(hf, sizes),
        qkv_bias=False,
        proj_bias=False,
        mlp_bias=False,
        **read_window_of_all_layers(hf, sizes["num_layers"], default=None),
        **llama.read_blocks(hf, norm_epsilon=1e-5),
        **sizes,
    )


def _read_rope(hf: HFConfig, sizes: dict[str, Any]) -> Rope:
    """The rotary settings. Like `transformers.Phi3Config`, it takes yarn, an early name, for longrope, and allows no other scaling."""
    values = {"original_max_position_embeddings": 4096, **hf.values}
    for key in ("rope_scaling", "rope_parameters"):
        if hf.has(key):
            section = hf.section(key).values
            values[key] = {name: "longrope" if value == "yarn" else value for name, value in section.items()}
    rope = read_rope(
        HFConfig(values, hf.source),
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["max_position_embeddings"],
        partial_rotary_factor=1.0,
    )
    if rope.scaling is not None and not isinstance(rope.scaling, LongRopeScaling):
        raise hf.error("rope_parameters: rope_type is not supported in a phi3 model, only 'default' and 'longrope'")
    return rope
