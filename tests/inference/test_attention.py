"""The attention of compressed models, against a transcription of its formula in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

from maskllm.export.compress import compress
from maskllm.inference import attention as module
from maskllm.inference.attention import ATTENTION, attention
from tests.inference.sparse_models import write_sparse

ALL, SIZE, BATCH = 21, 16, 2


def layer(groups: int) -> nn.Module:
    """What transformers' attention asks its layer for."""
    made = nn.Module()
    made.num_key_value_groups, made.is_causal = groups, True
    return made


def formula(query, key, value, mask, scaling) -> torch.Tensor:
    """softmax(query key^T scaling + mask) value, [batch, tokens, heads, head size], in fp64."""
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (states.double().repeat_interleave(groups, 1) for states in (key, value))
    scores = query.double() @ key.transpose(2, 3) * (SIZE**-0.5 if scaling is None else scaling)
    if mask is None:
        mask = torch.ones(tokens, ALL, dtype=torch.bool).tril(ALL - tokens)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def masks_of(heads: int) -> dict[str, torch.Tensor | None]:
    allowed = torch.rand(BATCH, 1, 1, ALL) > 0.3
    allowed[..., -1] = True
    added = torch.randn(BATCH, heads, 1, ALL)
    return {"none": None, "allowed": allowed, "added to each head": added, "added": added[:, :1]}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("mask", ["none", "allowed", "added to each head", "added"])
@pytest.mark.parametrize("scaling", [None, 0.4])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4), (4, 1)])
def test_one_token(heads, key_heads, scaling, mask, native, dtype, bound, monkeypatch):
    monkeypatch.setattr(module, "_NATIVE_BF16", native)
    torch.manual_seed(0)
    query = torch.randn(BATCH, 1, heads, SIZE).to(dtype).transpose(1, 2)  # as a model has it: heads and tokens change places
    key, value = torch.randn(2, BATCH, key_heads, ALL, SIZE).to(dtype)
    masks = masks_of(heads)[mask]
    if masks is not None and masks.dtype != torch.bool:
        masks = masks.to(dtype)
    found, weights = attention(layer(heads // key_heads), query, key, value, masks, scaling=scaling, dropout=0.0)
    assert found.dtype == dtype and weights is None
    torch.testing.assert_close(found.double(), formula(query, key, value, masks, scaling), rtol=bound, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_compiles(dtype):
    query, key, value = (torch.randn(1, 4, tokens, SIZE).to(dtype) for tokens in (1, ALL, ALL))
    given = (layer(1), query, key, value, None)
    assert torch.equal(torch.compile(attention, backend="aot_eager", fullgraph=True)(*given)[0], attention(*given)[0])


@pytest.mark.parametrize("options", [{}, {"position_bias": torch.full((1, 4, 1, ALL), 0.5)}])
def test_what_is_not_one_plain_token_is_left_to_transformers(options, monkeypatch):
    called = []
    real = module.sdpa_attention_forward
    monkeypatch.setattr(module, "sdpa_attention_forward", lambda *given, **named: called.append(1) or real(*given, **named))
    tokens = 1 if options else ALL
    query, (key, value) = torch.randn(1, 4, tokens, SIZE), torch.randn(2, 1, 4, ALL, SIZE)
    found, _ = attention(layer(1), query, key, value, None, **options)
    assert called
    torch.testing.assert_close(found.double(), formula(query, key, value, options.get("position_bias"), None), rtol=1e-5, atol=1e-5)


def compressed(tmp_path: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    compress(write_sparse(tmp_path / "hf", kind, dtype), tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("kind", "auto", "name"),
    [
        ("llama3", AutoModelForCausalLM, ATTENTION),
        ("whisper", AutoModelForSpeechSeq2Seq, ATTENTION),
        ("falcon", AutoModelForCausalLM, "sdpa"),
    ],
)
def test_models_that_take_it(kind, auto, name, tmp_path):
    directory = compressed(tmp_path, kind)
    model = auto.from_pretrained(directory)
    assert model.config._attn_implementation == name
    model.save_pretrained(tmp_path / "again")
    assert "sdpa" not in (tmp_path / "again" / "config.json").read_text()
    assert model.dequantize().config._attn_implementation == "sdpa"
    assert auto.from_pretrained(directory, attn_implementation="eager").config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama3", "gpt2"])
def test_padded_texts(kind, dtype, tmp_path):
    """Two texts at once, the shorter with padding before it: the next token's logits are those of transformers' attention."""
    model = AutoModelForCausalLM.from_pretrained(compressed(tmp_path, kind, dtype), dtype=dtype).eval()
    tokens, allowed = torch.arange(3, 23).reshape(2, 10), torch.ones(2, 11, dtype=torch.long)
    allowed[0, :4] = 0

    @torch.no_grad()
    def logits() -> torch.Tensor:
        cache = model(tokens, attention_mask=allowed[:, :10], use_cache=True).past_key_values
        return model(torch.tensor([[30], [31]]), attention_mask=allowed, past_key_values=cache).logits

    found = logits()
    model.set_attn_implementation("sdpa")
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, logits(), rtol=bound, atol=bound)
