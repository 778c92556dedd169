"""The LLaMA family (2, 3, 3.1, 3.2) and every model of its architecture that calls itself `llama`, SmolLM2 among them."""

from __future__ import annotations

from maskllm.errors import MaskLLMError
from maskllm.models.config import Llama3RopeScaling, ModelConfig
from maskllm.models.hf_config import HFConfig
from maskllm.models.mapping import QKV, Direct, GatedMLP, Mapping, expand

EMBEDDING = Direct("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden"))

LAYER = [
    Direct("decoder.layers.*.self_attention.linear_qkv.layer_norm_weight", ("model.layers.*.input_layernorm.weight",), ("hidden",)),
    QKV(
        "decoder.layers.*.self_attention.linear_qkv.weight",
        (
            "model.layers.*.self_attn.q_proj.weight",
            "model.layers.*.self_attn.k_proj.weight",
            "model.layers.*.self_attn.v_proj.weight",
        ),
        ("qkv", "hidden"),
    ),
    Direct("decoder.layers.*.self_attention.linear_proj.weight", ("model.layers.*.self_attn.o_proj.weight",), ("hidden", "heads")),
    Direct("decoder.layers.*.mlp.linear_fc1.layer_norm_weight", ("model.layers.*.post_attention_layernorm.weight",), ("hidden",)),
    GatedMLP(
        "decoder.layers.*.mlp.linear_fc1.weight",
        ("model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"),
        ("gate_and_up", "hidden"),
    ),
    Direct("decoder.layers.*.mlp.linear_fc2.weight", ("model.layers.*.mlp.down_proj.weight",), ("hidden", "ffn")),
]

LAYER_BIASES = [
    QKV(
        "decoder.layers.*.self_attention.linear_qkv.bias",
        (
            "model.layers.*.self_attn.q_proj.bias",
            "model.layers.*.self_attn.k_proj.bias",
            "model.layers.*.self_attn.v_proj.bias",
        ),
        ("qkv",),
    ),
    Direct("decoder.layers.*.self_attention.linear_proj.bias", ("model.layers.*.self_attn.o_proj.bias",), ("hidden",)),
    GatedMLP(
        "decoder.layers.*.mlp.linear_fc1.bias",
        ("model.layers.*.mlp.gate_proj.bias", "model.layers.*.mlp.up_proj.bias"),
        ("gate_and_up",),
    ),
    Direct("decoder.layers.*.mlp.linear_fc2.bias", ("model.layers.*.mlp.down_proj.bias",), ("hidden",)),
]

FINAL_NORM = Direct("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",))

OUTPUT = Direct("output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"))
"""Only where the output layer is not tied to the embedding."""

TIED_COPIES = {"lm_head.weight": "model.embed_tokens.weight"}
"""Tensors that a checkpoint with tied embeddings may hold a second time."""

DERIVED_BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Names of tensors that old checkpoints hold but that the config determines; they are not converted."""


def parameter_map(config: ModelConfig) -> list[Mapping]:
    """Every tensor of the model, in the order of the forward pass."""
    layer = LAYER + LAYER_BIASES if config.add_bias else LAYER
    output = [] if config.tie_word_embeddings else [OUTPUT]
    return [EMBEDDING, *expand(layer, config.num_layers), FINAL_NORM, *output]


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` whose model_type is "llama"; absent keys have `transformers.LlamaConfig`'s defaults.

    Raises MaskLLMError that names the key for a value that is missing, malformed or not supported.
    """
    hf.require("hidden_act", "silu", default="silu")
    attention_bias = hf.boolean("attention_bias", default=False)
    if attention_bias != hf.boolean("mlp_bias", default=False):
        raise hf.error(
            f"attention_bias is {attention_bias} and mlp_bias is {not attention_bias}; only both or neither is supported"
        )
    hidden_size = hf.integer("hidden_size")
    heads = hf.integer("num_attention_heads")
    groups = hf.integer("num_key_value_heads", default=heads)
    if heads % groups:
        raise hf.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if not hf.has("head_dim") and hidden_size % heads:
        raise hf.error(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, and there is no head_dim")
    max_position_embeddings = hf.integer("max_position_embeddings", default=2048)
    rope = _rope_parameters(hf)
    return ModelConfig(
        model_type="llama",
        num_layers=hf.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        ffn_hidden_size=hf.integer("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=hf.integer("head_dim", default=hidden_size // heads),
        vocab_size=hf.integer("vocab_size"),
        max_position_embeddings=max_position_embeddings,
        norm_epsilon=hf.number("rms_norm_eps", default=1e-6),
        rope_theta=rope.number("rope_theta", default=10000.0),
        rope_scaling=_rope_scaling(rope, max_position_embeddings),
        tie_word_embeddings=hf.boolean("tie_word_embeddings", default=False),
        add_bias=attention_bias,
    )


def _rope_parameters(hf: HFConfig) -> HFConfig:
    """The rotary settings as transformers 5 spells them (`rope_parameters`), from that spelling or the older one."""
    if hf.has("rope_parameters"):
        return hf.section("rope_parameters")
    values = dict(hf.section("rope_scaling").values) if hf.has("rope_scaling") else {}
    if "type" in values:
        values.setdefault("rope_type", values["type"])
    if hf.has("rope_theta"):
        values["rope_theta"] = hf.number("rope_theta")
    return HFConfig(values, f"{hf.where}: rope_scaling")


def _rope_scaling(rope: HFConfig, max_position_embeddings: int) -> Llama3RopeScaling | None:
    kind = rope.values.get("rope_type", "default")
    if rope.number("partial_rotary_factor", default=1.0) != 1.0:
        raise rope.error(f"partial_rotary_factor {rope.values['partial_rotary_factor']} is not supported, only 1.0")
    if kind == "default":
        return None
    if kind != "llama3":
        raise rope.error(f"rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    scaling = Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", default=max_position_embeddings),
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise MaskLLMError(
            f"{rope.where}: low_freq_factor {scaling.low_freq_factor} must be below high_freq_factor {scaling.high_freq_factor}"
        )
    return scaling
