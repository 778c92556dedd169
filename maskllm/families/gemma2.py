"""The Gemma 2 family (arXiv 2408.00118).

It differs from LLaMA in norms on both sides of attention and MLP, which multiply by 1 + their weight, scaled embeddings, tanh GELU,
soft-capped attention scores and logits, and a sliding window in every second layer.
"""

from __future__ import annotations

from typing import Any

from maskllm.families import llama
from maskllm.families.hf_config import HFConfig
from maskllm.families.linears import FC2, PROJ
from maskllm.families.llama import BASE_PREFIX, DERIVED_BUFFERS, TIED_COPIES
from maskllm.families.mapping import Direct, Mapping
from maskllm.families.model_config import ModelConfig
from maskllm.families.rope import read_rope
from maskllm.families.windows import read_windows

__all__ = ["BASE_PREFIX", "DERIVED_BUFFERS", "TIED_COPIES", "parameter_map", "read_config"]

ATTENTION_POST_NORM = Direct(
    f"decoder.layers.*.{PROJ.name}.post_layernorm.weight", ("model.layers.*.post_attention_layernorm.weight",), ("hidden",)
)
MLP_NORM = Direct(
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight", ("model.layers.*.pre_feedforward_layernorm.weight",), ("hidden",)
)
MLP_POST_NORM = Direct(
    f"decoder.layers.*.{FC2.name}.post_layernorm.weight", ("model.layers.*.post_feedforward_layernorm.weight",), ("hidden",)
)


def parameter_map(config: ModelConfig) -> list[Mapping]:
    """Every tensor of the model, in the order of the forward pass."""
    attention = [llama.INPUT_NORM, *llama.attention(config), ATTENTION_POST_NORM]
    mlp = [MLP_NORM, llama.MLP_GATE_AND_UP, llama.MLP_DOWN, MLP_POST_NORM]
    return llama.with_ends(attention + mlp, config)


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "gemma2"; absent keys have the defaults of `transformers.Gemma2Config`.

    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    shared = read_shared(hf, max_position_embeddings=8192)
    return ModelConfig(
        model_type="gemma2",
        rope=read_rope(hf, head_dim=shared["head_dim"], max_position_embeddings=shared["max_position_embeddings"]),
        attention_softcap=hf.nullable(hf.number, "attn_logit_softcapping", default=50.0),
        logit_softcap=hf.nullable(hf.number, "final_logit_softcapping", default=30.0),
        **read_windows(
            hf,
            shared["num_layers"],
            window=hf.nullable(hf.integer, "sliding_window", default=4096),
            default=lambda layer: layer % 2 == 0,
        ),
        **shared,
    )


def read_shared(hf: HFConfig, *, max_position_embeddings: int) -> dict[str, Any]:
    """The fields of `ModelConfig` that Gemma 2 and Gemma 3 share. Raises MaskLLMError as `read_config` does."""
    hf.require("hidden_activation", "gelu_pytorch_tanh", default="gelu_pytorch_tanh")
    hf.require("use_bidirectional_attention", False, default=False)
    hf.require("attention_bias", False, default=False)
    sizes = llama.read_sizes(
        hf, max_position_embeddings=max_position_embeddings, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True
    )
    return {
        "normalization": "RMSNorm",
        "zero_centered_norm": True,
        "norm_epsilon": hf.number("rms_norm_eps", default=1e-6),
        "activation": "gelu_tanh",
        "gated_mlp": True,
        "qkv_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
        "post_norms": True,
        "attention_scale": hf.number("query_pre_attn_scalar", default=256) ** -0.5,
        "embedding_scale": sizes["hidden_size"] ** 0.5,
        **sizes,
    }
