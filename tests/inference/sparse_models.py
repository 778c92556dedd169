"""Tiny sparse transformers models of several kinds, as transformers writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from maskllm.huggingface.blocks import block_linears, matrix
from tests.families.tiny import CONFIGS, tiny_model


def t5() -> PreTrainedModel:
    """An encoder and a decoder whose blocks are in `block`."""
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def whisper() -> PreTrainedModel:
    """A speech encoder, and a decoder that is tied to the output layer."""
    config = WhisperConfig(
        vocab_size=96,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    return WhisperForConditionalGeneration(config)


def falcon() -> PreTrainedModel:
    """A decoder whose attention is a class of its own, not a function of transformers' table."""
    return FalconForCausalLM(FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))


def sparse_model(kind: str, dtype: torch.dtype = torch.float32, n: int = 2, m: int = 4) -> PreTrainedModel:
    """A random model; of each `m` weights in a row of its blocks' matrices, the `n` largest are kept."""
    torch.manual_seed(0)
    model = {"t5": t5, "whisper": whisper, "falcon": falcon}[kind]() if kind not in CONFIGS else tiny_model(kind)
    with torch.no_grad():
        for linear in block_linears(model).values():
            weight = matrix(linear)
            ranks = weight.abs().unflatten(1, (-1, m)).argsort(-1, descending=True).argsort(-1)
            weight.masked_fill_((ranks >= n).flatten(1), 0)
    return model.to(dtype).eval()


def write_sparse(path: Path, kind: str, dtype: torch.dtype = torch.float32, n: int = 2, m: int = 4) -> Path:
    """`sparse_model` as a Hugging Face directory; returns `path`."""
    sparse_model(kind, dtype, n, m).save_pretrained(path)
    return path


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs for a model of `sparse_model`."""
    tokens = torch.arange(3, 20)[None]
    if model.config.model_type == "whisper":
        features = torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(1)).to(model.dtype)
        return {"input_features": features, "decoder_input_ids": tokens}
    return {"input_ids": tokens, "decoder_input_ids": tokens} if model.config.model_type == "t5" else {"input_ids": tokens}


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """The logits of `inputs_of`."""
    return model(**inputs_of(model)).logits
