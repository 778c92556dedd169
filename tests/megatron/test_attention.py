"""Core attention with windows and soft-capped scores, against scores computed at once."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from maskllm.megatron.attention import SDPACoreAttention
from maskllm.megatron.transformer_config import FamilyTransformerConfig

SEQUENCE, BATCH, HEADS, GROUPS, CHANNELS = 17, 2, 4, 2, 8


def whole_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, cap: float | None) -> torch.Tensor:
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (key, value))
    scores = torch.einsum("ibhd,jbhd->bhij", query, key) * 0.3
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    distance = torch.arange(SEQUENCE)[:, None] - torch.arange(SEQUENCE)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    return torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), value).flatten(2)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize(
    ("window", "layers", "expected"), [(None, None, SEQUENCE), (5, None, 5), (5, [0, 1], SEQUENCE), (5, [1, 0], 5)]
)
def test_a_window_and_a_cap_of_the_scores(window, layers, expected, cap):
    config = FamilyTransformerConfig(
        num_layers=2, hidden_size=HEADS * CHANNELS, num_attention_heads=HEADS, num_query_groups=GROUPS, attention_softcap=cap,
        window_size=None if window is None else (window - 1, 0), window_attn_skip_freq=layers, attention_dropout=0.0,
    )  # fmt: skip
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.3)
    generator = torch.Generator().manual_seed(0)
    shapes = [(SEQUENCE, BATCH, heads, CHANNELS) for heads in (HEADS, GROUPS, GROUPS)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(SEQUENCE, BATCH, HEADS * CHANNELS, generator=generator, dtype=torch.float64)
    found, wanted = attention(*inputs, None), whole_scores(*inputs, expected, cap)
    tolerance = {"rtol": 0, "atol": 1e-12 if cap is None else 1e-6}  # soft-capped scores pass through an fp32 softmax
    torch.testing.assert_close(found, wanted, **tolerance)
    gradients = [torch.autograd.grad((output * weights).sum(), inputs) for output in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance["atol"])
