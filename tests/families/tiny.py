"""Tiny random models of each supported configuration, as transformers writes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}

BASE = SIZES | {"rms_norm_eps": 1e-5}
"""LLaMA's settings."""

NEMOTRON = SIZES | {"model_type": "nemotron", "norm_eps": 1e-4, "num_key_value_heads": 2}

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "layer_norm_epsilon": 1e-4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

# Not LLaMA 3.1's own factors, so that a test notices if Megatron's built-in ones are used. They reach every branch of the formula.
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "beta_fast": 12.0,
    "beta_slow": 1.5,
    "original_max_position_embeddings": 32,
}

LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.2, 2.0, 3.5, 5.0]}
"""For heads with 8 rotated channels."""

GEMMA = SIZES | {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": 60,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": BASE,
    "llama3": BASE | {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": BASE | {"num_key_value_heads": 2, "rope_parameters": SCALED_ROPE},
    "llama3.2": BASE | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": SCALED_ROPE},
    "linear": BASE | {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
    # Original lengths that are below the lengths of the tests' sequences.
    "dynamic": BASE | {"max_position_embeddings": 96, "rope_theta": 1000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "yarn": BASE | {"rope_parameters": YARN, "original_max_position_embeddings": 96},
    "longrope": BASE | {"rope_theta": 1000.0, "rope_scaling": LONGROPE, "original_max_position_embeddings": 96},
    "biases": BASE | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "attention_bias": BASE | {"num_key_value_heads": 2, "attention_bias": True},
    "mlp_bias": BASE | {"mlp_bias": True},
    "mistral": BASE | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 100},
    "mistral_without_window": BASE | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "qwen2": BASE | {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2_window": BASE
    | {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 60, "max_window_layers": 1},
    "qwen3": BASE | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "qwen3_biases": BASE | {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True},
    "gemma2": GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "gemma2_without_caps": GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "gemma3": GEMMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": BASE | {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0},
    "phi3_yarn": BASE
    | {
        "model_type": "phi3",
        "pad_token_id": 0,
        "original_max_position_embeddings": 96,
        "rope_scaling": {"type": "yarn", **{key: LONGROPE[key] for key in ("short_factor", "long_factor")}},
    },
    "phi3_window": BASE
    | {
        "model_type": "phi3",
        "pad_token_id": 0,
        "sliding_window": 70,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "nemotron": NEMOTRON | {"rope_parameters": YARN},
    "nemotron_biases": NEMOTRON
    | {
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": SCALED_ROPE | {"partial_rotary_factor": 0.75},
    },
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu_pytorch_tanh"},
}


def tiny_config(name: str) -> PreTrainedConfig:
    """The transformers config of CONFIGS[name]."""
    return AutoConfig.for_model(**copy.deepcopy({"model_type": "llama"} | CONFIGS[name]))


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model CONFIGS[name], without dropout. Weights are large, so that attention is not uniform, and biases are not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def write_tiny(name: str, path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Write the model CONFIGS[name] to `path` and return it."""
    model = tiny_model(name, dtype)
    model.save_pretrained(path)
    return model
