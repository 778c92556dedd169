"""The LLaMA family (2 to 3.3), and all models with its architecture and model_type "llama", such as SmolLM2."""

from __future__ import annotations

from typing import Any

from maskllm.families.hf_config import HFConfig
from maskllm.families.linears import FC1, FC2, PROJ, QKV
from maskllm.families.mapping import Direct, GatedMLP, Mapping, QKVByGroup, Vocabulary, expand
from maskllm.families.model_config import ModelConfig
from maskllm.families.rope import read_rope

BASE_PREFIX = "model."

EMBEDDING = Vocabulary("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"))

INPUT_NORM = Direct(
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight", ("model.layers.*.input_layernorm.weight",), ("hidden",)
)

ATTENTION = [
    QKVByGroup(
        QKV.weight,
        (
            "model.layers.*.self_attn.q_proj.weight",
            "model.layers.*.self_attn.k_proj.weight",
            "model.layers.*.self_attn.v_proj.weight",
        ),
        QKV.dimensions,
    ),
    Direct(PROJ.weight, ("model.layers.*.self_attn.o_proj.weight",), PROJ.dimensions),
]

MLP_NORM = Direct(
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight", ("model.layers.*.post_attention_layernorm.weight",), ("hidden",)
)

MLP_GATE_AND_UP = GatedMLP(
    FC1.weight,
    ("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"),
    FC1.dimensions,
)

MLP_DOWN = Direct(FC2.weight, ("model.layers.*.mlp.down_proj.weight",), FC2.dimensions)

QKV_BIAS = QKVByGroup(
    QKV.bias,
    (
        "model.layers.*.self_attn.q_proj.bias",
        "model.layers.*.self_attn.k_proj.bias",
        "model.layers.*.self_attn.v_proj.bias",
    ),
    QKV.dimensions[:1],
)

PROJ_BIAS = Direct(PROJ.bias, ("model.layers.*.self_attn.o_proj.bias",), ("hidden",))

QK_NORMS = [
    Direct("decoder.layers.*.self_attention.q_layernorm.weight", ("model.layers.*.self_attn.q_norm.weight",), ("head",)),
    Direct("decoder.layers.*.self_attention.k_layernorm.weight", ("model.layers.*.self_attn.k_norm.weight",), ("head",)),
]

MLP_GATE_AND_UP_BIAS = GatedMLP(
    FC1.bias,
    ("model.layers.*.mlp.gate_proj.bias", "model.layers.*.mlp.up_proj.bias"),
    FC1.dimensions[:1],
)

MLP_DOWN_BIAS = Direct(FC2.bias, ("model.layers.*.mlp.down_proj.bias",), ("hidden",))

FINAL_NORM = Direct("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",))

OUTPUT = Vocabulary("output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"))
"""Only if the output layer is not tied to the embedding."""

TIED_COPIES = {"lm_head.weight": "model.embed_tokens.weight"}

DERIVED_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
"""The rotary frequencies that old checkpoints hold."""


def parameter_map(config: ModelConfig) -> list[Mapping]:
    """Every tensor of the model, in the order of the forward pass."""
    layer = [INPUT_NORM, *attention(config), MLP_NORM, MLP_GATE_AND_UP, MLP_DOWN]
    if config.mlp_bias:
        layer += [MLP_GATE_AND_UP_BIAS, MLP_DOWN_BIAS]
    return with_ends(layer, config)


def attention(config: ModelConfig) -> list[Mapping]:
    """The tensors of a layer's attention, without the norm before it."""
    mappings = list(ATTENTION)
    if config.qkv_bias:
        mappings.append(QKV_BIAS)
    if config.proj_bias:
        mappings.append(PROJ_BIAS)
    return mappings + QK_NORMS if config.qk_norm else mappings


def with_ends(layer: list[Mapping], config: ModelConfig) -> list[Mapping]:
    """`layer` for all layers, between the embedding, and the final norm and output layer."""
    output = [] if config.tie_word_embeddings else [OUTPUT]
    return [EMBEDDING, *expand(layer, config.num_layers), FINAL_NORM, *output]


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "llama"; absent keys have the defaults of `transformers.LlamaConfig`.

    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    sizes = read_sizes(hf, max_position_embeddings=2048)
    return ModelConfig(
        model_type="llama",
        rope=read_rope(hf, head_dim=sizes["head_dim"], max_position_embeddings=sizes["max_position_embeddings"]),
        **read_blocks(hf),
        **sizes,
        **read_biases(hf),
    )


def read_blocks(hf: HFConfig, *, norm_epsilon: float = 1e-6) -> dict[str, Any]:
    """The fields of `ModelConfig` for RMSNorm and a SiLU MLP with a gate. `norm_epsilon` is the family's default.

    Raises MaskLLMError as `read_config` does.
    """
    hf.require("hidden_act", "silu", default="silu")
    return {
        "normalization": "RMSNorm",
        "zero_centered_norm": False,
        "norm_epsilon": hf.number("rms_norm_eps", default=norm_epsilon),
        "activation": "silu",
        "gated_mlp": True,
    }


def read_biases(hf: HFConfig) -> dict[str, bool]:
    """The fields of `ModelConfig` that `attention_bias` and `mlp_bias` set. Raises MaskLLMError as `read_config` does."""
    attention_bias = hf.boolean("attention_bias", default=False)
    return {
        "qkv_bias": attention_bias,
        "proj_bias": attention_bias,
        "mlp_bias": hf.boolean("mlp_bias", default=False),
    }


def read_sizes(
    hf: HFConfig,
    *,
    max_position_embeddings: int,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    tie_word_embeddings: bool = False,
) -> dict[str, Any]:
    """The fields of `ModelConfig` that LLaMA and the families with the same keys in `config.json` share.

    The arguments are the family's defaults; None for as many key-value heads as heads, and for heads that divide the hidden size.
    Raises MaskLLMError as `read_config` does.
    """
    hidden_size = hf.integer("hidden_size")
    heads = hf.integer("num_attention_heads")
    groups = hf.nullable(hf.integer, "num_key_value_heads", default=num_key_value_heads) or heads
    if heads % groups:
        raise hf.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if not hf.has("head_dim") and head_dim is None and hidden_size % heads:
        raise hf.error(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, and there is no head_dim")
    return {
        "num_layers": hf.integer("num_hidden_layers"),
        "hidden_size": hidden_size,
        "ffn_hidden_size": hf.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "head_dim": hf.integer("head_dim", default=head_dim or hidden_size // heads),
        "vocab_size": hf.integer("vocab_size"),
        "max_position_embeddings": hf.integer("max_position_embeddings", default=max_position_embeddings),
        "tie_word_embeddings": hf.boolean("tie_word_embeddings", default=tie_word_embeddings),
    }
