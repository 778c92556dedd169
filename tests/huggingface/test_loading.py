"""Which models `load_hf_model` takes for causal language models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from maskllm.errors import MaskLLMError
from maskllm.huggingface.loading import load_hf_model

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def load(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    model.save_pretrained(directory)
    return load_hf_model(directory, device=torch.device("cpu"))


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    torch.manual_seed(1)
    with pytest.raises(MaskLLMError, match=f"{tmp_path}: is a bert model, which sees the tokens that it is to predict"):
        load(BertLMHeadModel(BertConfig(**SIZES, initializer_range=0.3)), tmp_path)


@pytest.mark.parametrize(
    "model",
    [BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)), GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))],
    ids=["bert", "gpt_neox"],
)
def test_a_decoder_is_loaded(model, tmp_path):
    """The configuration of GPT-NeoX has `is_decoder` false, which means nothing there."""
    assert type(load(model, tmp_path)) is type(model)
