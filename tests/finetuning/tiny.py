"""Minute random models of many families, and batches that they take."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

VOCABULARY, TOKENS, FRAMES = 64, 10, 16
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    **_IDS,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    **_IDS,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "init_std": 0.2,
    **_IDS,
}
_WINDOWED = _LLAMA | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 4},
    "gemma2": _WINDOWED,
    "gemma3_text": _WINDOWED,
    "phi3": _LLAMA,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "initializer_range": 0.2,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **_IDS,
    },
    "gpt_neox": _LLAMA,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 16,
        **_IDS,
    },
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **_IDS},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2, **_IDS},
    "mpt": {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 32, **_IDS},
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
    "marian": _BART,
    "whisper": _BART
    | {
        "num_mel_bins": 8,
        "max_source_positions": FRAMES // 2,
        "max_target_positions": 32,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
    },
    "mixtral": _LLAMA | {"num_local_experts": 2},
    "vit": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "num_labels": 4,
    },
}

_KINDS = {"t5": AutoModelForSeq2SeqLM, "mt5": AutoModelForSeq2SeqLM, "bart": AutoModelForSeq2SeqLM, "marian": AutoModelForSeq2SeqLM}
_KINDS |= {"whisper": AutoModelForSpeechSeq2Seq, "vit": AutoModelForImageClassification}


def tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    """A model with weights that depend on its name and settings alone."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(CONFIGS[name] | changes))
    return _KINDS.get(name, AutoModelForCausalLM).from_config(config)


def samples(name: str, count: int, *, padded: bool = True) -> list[dict[str, torch.Tensor]]:
    """Samples for a model, without a batch dimension; every other one ends in padding if `padded`."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(count):
        labels = torch.randint(3, VOCABULARY, (TOKENS,), generator=generator)
        length = TOKENS - 3 if padded and index % 2 else TOKENS
        mask = (torch.arange(TOKENS) < length).long()
        counted = labels.masked_fill(mask == 0, -100)
        if name == "vit":
            found.append({"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": labels[0] % 4})
        elif name == "whisper":
            found.append({"input_features": torch.randn(8, FRAMES, generator=generator), "labels": counted})
        elif name in _KINDS:
            tokens = torch.randint(3, VOCABULARY, (TOKENS,), generator=generator)
            found.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": counted})
        else:
            found.append({"input_ids": labels * mask, "attention_mask": mask, "labels": counted})
    return found


def batches(data: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """Each sample as a batch of one."""
    return [{name: tensor[None] for name, tensor in sample.items()} for sample in data]
