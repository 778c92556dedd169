"""The Nemotron family (Nemotron-4 15B, arXiv 2402.16819, and Minitron).

It has LLaMA's tensor names, with LayerNorm1P, squared ReLU without a gate, and rotary embeddings of a part of each head. Both
Hugging Face and Megatron store the norms' weights as distances from 1 (`ModelConfig.zero_centered_norm`), so they are copied
unchanged.
"""

from __future__ import annotations

from maskllm.families import llama
from maskllm.families.hf_config import HFConfig
from maskllm.families.linears import FC1
from maskllm.families.llama import BASE_PREFIX, DERIVED_BUFFERS, TIED_COPIES
from maskllm.families.mapping import Direct, Mapping, expand
from maskllm.families.model_config import ModelConfig
from maskllm.families.rope import read_rope

__all__ = ["BASE_PREFIX", "DERIVED_BUFFERS", "TIED_COPIES", "parameter_map", "read_config"]

INPUT_NORM_BIAS = Direct(
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_bias", ("model.layers.*.input_layernorm.bias",), ("hidden",)
)
MLP_NORM_BIAS = Direct(
    "decoder.layers.*.mlp.linear_fc1.layer_norm_bias", ("model.layers.*.post_attention_layernorm.bias",), ("hidden",)
)
MLP_UP = Direct(FC1.weight, ("model.layers.*.mlp.up_proj.weight",), FC1.dimensions)
MLP_UP_BIAS = Direct(FC1.bias, ("model.layers.*.mlp.up_proj.bias",), FC1.dimensions[:1])
FINAL_NORM_BIAS = Direct("decoder.final_layernorm.bias", ("model.norm.bias",), ("hidden",))


def parameter_map(config: ModelConfig) -> list[Mapping]:
    """Every tensor of the model, in the order of the forward pass."""
    layer = [llama.INPUT_NORM, INPUT_NORM_BIAS, *llama.attention(config), llama.MLP_NORM, MLP_NORM_BIAS, MLP_UP, llama.MLP_DOWN]
    if config.mlp_bias:
        layer += [MLP_UP_BIAS, llama.MLP_DOWN_BIAS]
    output = [] if config.tie_word_embeddings else [llama.OUTPUT]
    return [llama.EMBEDDING, *expand(layer, config.num_layers), llama.FINAL_NORM, FINAL_NORM_BIAS, *output]


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "nemotron"; absent keys have `transformers.NemotronConfig`'s defaults.

    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    hf.require("hidden_act", "relu2", default="relu2")
    sizes = llama.read_sizes(hf, max_position_embeddings=4096)
    return ModelConfig(
        model_type="nemotron",
        normalization="LayerNorm",
        zero_centered_norm=True,
        norm_epsilon=hf.number("norm_eps", default=1e-5),
        activation="squared_relu",
        gated_mlp=False,
        rope=read_rope(
            hf,
            head_dim=sizes["head_dim"],
            max_position_embeddings=sizes["max_position_embeddings"],
            partial_rotary_factor=0.5,
        ),
        **sizes,
        **llama.read_biases(hf),
    )
