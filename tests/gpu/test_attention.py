"""Attention on CUDA never holds all scores, in any dtype. Needs a GPU."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from maskllm.megatron.attention import SDPACoreAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [2, 8])
def test_attention_is_exact_without_holding_all_scores(dtype, groups):
    length, heads, size = 2048, 8, 64
    config = TransformerConfig(num_layers=1, hidden_size=heads * size, num_attention_heads=heads)
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    generator = torch.Generator("cuda").manual_seed(0)
    query, key, value = (
        torch.randn(length, 1, count, size, device="cuda", dtype=dtype, generator=generator, requires_grad=True)
        for count in (heads, groups, groups)
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    context = attention(query, key, value, None)
    context.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < heads * length**2 * dtype.itemsize / 2

    q, k, v = (x.detach().cpu().double().permute(1, 2, 0, 3) for x in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != heads)
    found = context.detach().cpu().double().view(length, 1, heads, size).permute(1, 2, 0, 3)
    assert torch.allclose(found, expected, atol=1e-4 if dtype is torch.float32 else 2e-2)
