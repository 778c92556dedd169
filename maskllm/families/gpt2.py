"""The GPT-2 family: learned positions, LayerNorm, tanh GELU, biases in all linears.

transformers also uses it for models of GPT-3's architecture (arXiv 2005.14165, section 2.1, without its sparse attention).

Its linears are transformers' `Conv1D`, which stores weights as [in, out]. Megatron's weights, and all masks in a Megatron
checkpoint, are [out, in], with blocks of M along `in`. The dropout in the config is not applied, because the weights are frozen.
"""

from __future__ import annotations

from maskllm.families.hf_config import HFConfig
from maskllm.families.linears import FC1, FC2, PROJ, QKV
from maskllm.families.mapping import Direct, Mapping, StackedQKV, Vocabulary, expand
from maskllm.families.model_config import ModelConfig

BASE_PREFIX = "transformer."

EMBEDDINGS = [
    Vocabulary("embedding.word_embeddings.weight", ("transformer.wte.weight",), ("vocab", "hidden")),
    Direct("embedding.position_embeddings.weight", ("transformer.wpe.weight",), ("positions", "hidden")),
]

LAYER = [
    Direct("decoder.layers.*.self_attention.linear_qkv.layer_norm_weight", ("transformer.h.*.ln_1.weight",), ("hidden",)),
    Direct("decoder.layers.*.self_attention.linear_qkv.layer_norm_bias", ("transformer.h.*.ln_1.bias",), ("hidden",)),
    StackedQKV(
        QKV.weight,
        ("transformer.h.*.attn.c_attn.weight",),
        QKV.dimensions,
        transposed=True,
    ),
    StackedQKV(QKV.bias, ("transformer.h.*.attn.c_attn.bias",), QKV.dimensions[:1]),
    Direct(
        PROJ.weight,
        ("transformer.h.*.attn.c_proj.weight",),
        PROJ.dimensions,
        transposed=True,
    ),
    Direct(PROJ.bias, ("transformer.h.*.attn.c_proj.bias",), ("hidden",)),
    Direct("decoder.layers.*.mlp.linear_fc1.layer_norm_weight", ("transformer.h.*.ln_2.weight",), ("hidden",)),
    Direct("decoder.layers.*.mlp.linear_fc1.layer_norm_bias", ("transformer.h.*.ln_2.bias",), ("hidden",)),
    Direct(FC1.weight, ("transformer.h.*.mlp.c_fc.weight",), FC1.dimensions, transposed=True),
    Direct(FC1.bias, ("transformer.h.*.mlp.c_fc.bias",), FC1.dimensions[:1]),
    Direct(FC2.weight, ("transformer.h.*.mlp.c_proj.weight",), FC2.dimensions, transposed=True),
    Direct(FC2.bias, ("transformer.h.*.mlp.c_proj.bias",), ("hidden",)),
]

FINAL_NORM = [
    Direct("decoder.final_layernorm.weight", ("transformer.ln_f.weight",), ("hidden",)),
    Direct("decoder.final_layernorm.bias", ("transformer.ln_f.bias",), ("hidden",)),
]

OUTPUT = Vocabulary("output_layer.weight", ("lm_head.weight",), ("vocab", "hidden"))
"""Only if the output layer is not tied to the embedding."""

TIED_COPIES = {"lm_head.weight": "transformer.wte.weight"}

DERIVED_BUFFERS = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
"""The causal masks that old checkpoints hold."""

TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
"""transformers' names for the tanh approximation of GELU."""


def parameter_map(config: ModelConfig) -> list[Mapping]:
    """Every tensor of the model, in the order of the forward pass."""
    output = [] if config.tie_word_embeddings else [OUTPUT]
    return [*EMBEDDINGS, *expand(LAYER, config.num_layers), *FINAL_NORM, *output]


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "gpt2"; absent keys have the defaults of `transformers.GPT2Config`.

    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    activation = hf.values.get("activation_function", TANH_GELU[0])
    if activation not in TANH_GELU:
        raise hf.error(f"activation_function {activation!r} is not supported, only {' and '.join(map(repr, TANH_GELU))}")
    hf.require("scale_attn_weights", True, default=True)
    hf.require("scale_attn_by_inverse_layer_idx", False, default=False)
    hf.require("add_cross_attention", False, default=False)
    hidden_size = hf.integer("n_embd")
    heads = hf.integer("n_head")
    if hidden_size % heads:
        raise hf.error(f"n_embd {hidden_size} is not a multiple of n_head {heads}")
    return ModelConfig(
        model_type="gpt2",
        num_layers=hf.integer("n_layer"),
        hidden_size=hidden_size,
        ffn_hidden_size=hf.integer("n_inner", default=4 * hidden_size),
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden_size // heads,
        vocab_size=hf.integer("vocab_size"),
        max_position_embeddings=hf.integer("n_positions", default=1024),
        normalization="LayerNorm",
        zero_centered_norm=False,
        norm_epsilon=hf.number("layer_norm_epsilon", default=1e-5),
        activation="gelu_tanh",
        gated_mlp=False,
        rope=None,
        tie_word_embeddings=hf.boolean("tie_word_embeddings", default=True),
        qkv_bias=True,
        proj_bias=True,
        mlp_bias=True,
    )
