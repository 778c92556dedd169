"""Tiny random models of each supported configuration, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}

# Not LLaMA 3.1's own factors, so that Megatron's built-in ones would be seen; every branch of the formula is taken.
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {},
    "llama3": {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": {"num_key_value_heads": 2, "rope_parameters": SCALED_ROPE},
    "llama3.2": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "rope_parameters": SCALED_ROPE},
    "biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The model CONFIGS[name], with weights large enough for attention to attend and biases that are not zero."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(BASE | CONFIGS[name])))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def write_tiny(name: str, path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Write the model CONFIGS[name] to `path` and return it."""
    model = tiny_model(name, dtype)
    model.save_pretrained(path)
    return model
