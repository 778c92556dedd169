"""Parameter maps: the row order of fused tensors, and the way back to the Hugging Face tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from maskllm.families.linears import LINEARS
from maskllm.families.mapping import GatedMLP, QKVByGroup, Vocabulary
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import parameter_map
from maskllm.families.rope import Rope
from maskllm.patterns import pack_mask, unpack_mask

CONFIG = ModelConfig(
    model_type="llama",
    num_layers=3,
    hidden_size=12,
    ffn_hidden_size=10,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=4,
    vocab_size=7,
    max_position_embeddings=16,
    normalization="RMSNorm",
    zero_centered_norm=False,
    norm_epsilon=1e-5,
    activation="silu",
    gated_mlp=True,
    rope=Rope(1e4, 4),
    tie_word_embeddings=False,
    qkv_bias=True,
    proj_bias=True,
    mlp_bias=True,
)


GPT2 = dataclasses.replace(CONFIG, model_type="gpt2", num_attention_heads=3, num_query_groups=3, gated_mlp=False, rope=None)
NEMOTRON = dataclasses.replace(CONFIG, model_type="nemotron", gated_mlp=False)
PHI3 = dataclasses.replace(CONFIG, model_type="phi3")
GEMMA3 = dataclasses.replace(CONFIG, model_type="gemma3_text", qk_norm=True, post_norms=True)
FAMILIES = pytest.mark.parametrize("config", [CONFIG, NEMOTRON, GPT2, PHI3, GEMMA3], ids=lambda config: config.model_type)


def mapping(kind, suffix, config=CONFIG):
    return next(m for m in parameter_map(config) if isinstance(m, kind) and m.megatron.endswith(suffix))


def test_fused_qkv_rows_are_ordered_by_query_group():
    # Each row holds its own identity: projection, head, channel.
    query = torch.tensor([[0, head, channel] for head in range(6) for channel in range(4)])
    key = torch.tensor([[1, head, channel] for head in range(2) for channel in range(4)])
    value = torch.tensor([[2, head, channel] for head in range(2) for channel in range(4)])
    fused = mapping(QKVByGroup, "qkv.weight").to_megatron([query, key, value], CONFIG)
    expected = []
    for group in range(2):
        heads = [(0, 3 * group), (0, 3 * group + 1), (0, 3 * group + 2), (1, group), (2, group)]
        expected += [[part, head, channel] for part, head in heads for channel in range(4)]
    assert fused.tolist() == expected


def test_gated_fc1_holds_gate_rows_then_up_rows():
    gate, up = torch.arange(10), torch.arange(100, 110)
    assert mapping(GatedMLP, "fc1.bias").to_megatron([gate, up], CONFIG).tolist() == [*range(10), *range(100, 110)]


def test_the_columns_of_a_stacked_transposed_qkv_become_rows_ordered_by_head():
    # As GPT-2 stores it, [in, out]. A value is 1000 * row + 100 * projection + 10 * head + channel.
    columns = torch.tensor([100 * part + 10 * head + channel for part in range(3) for head in range(3) for channel in range(4)])
    stored = columns.expand(12, -1) + 1000 * torch.arange(12)[:, None]
    fused = mapping(QKVByGroup, "qkv.weight", GPT2).to_megatron([stored], GPT2)
    rows = [100 * part + 10 * head + channel for head in range(3) for part in range(3) for channel in range(4)]
    assert fused.tolist() == [[row + 1000 * column for column in range(12)] for row in rows]


@FAMILIES
@pytest.mark.parametrize("multiple", [1, 4])
def test_to_hf_undoes_to_megatron(config, multiple):
    config = config.padded(multiple)
    generator = torch.Generator().manual_seed(0)
    for each in parameter_map(config):
        parts = [torch.randn(shape, generator=generator) for shape in each.hf_shapes(config)]
        fused = each.to_megatron(parts, config)
        assert tuple(fused.shape) == each.megatron_shape(config), each.megatron
        for part, back in zip(parts, each.to_hf(fused, config), strict=True):
            assert torch.equal(part, back), each.megatron


def test_padding_grows_to_a_multiple_and_never_shrinks():
    assert [CONFIG.padded(multiple).dimensions()["vocab"] for multiple in (1, 2, 7, 128)] == [7, 8, 7, 128]
    assert CONFIG.padded(128).padded(3).dimensions()["vocab"] == 129
    assert CONFIG.padded(128).padded(2) == CONFIG.padded(128)
    embedding = mapping(Vocabulary, "word_embeddings.weight").to_megatron([torch.ones(7, 12)], CONFIG.padded(8))
    assert torch.equal(embedding, torch.cat([torch.ones(7, 12), torch.zeros(1, 12)]))


@FAMILIES
def test_packed_masks_are_fused_and_split_as_masks_are(config):
    each = mapping(QKVByGroup, "qkv.weight", config)
    mask = torch.rand(each.megatron_shape(config), generator=torch.Generator().manual_seed(0)) < 0.5
    bits = each.split(pack_mask(mask), config)
    assert all(torch.equal(unpack_mask(a, 12), b) for a, b in zip(bits, each.split(mask, config), strict=True))
    assert torch.equal(unpack_mask(each.fuse(bits, config), 12), mask)


@FAMILIES
def test_the_masked_linears_are_all_linears_of_the_layers_and_no_others(config):
    expected = {f"decoder.layers.{layer}.{linear.name}" for layer in range(3) for linear in LINEARS}
    assert {m.linear for m in parameter_map(config)} - {None} == expected
