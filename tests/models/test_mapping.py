"""The fused layouts, row by row."""

from __future__ import annotations

import torch

from maskllm.models.config import ModelConfig
from maskllm.models.families import parameter_map
from maskllm.models.mapping import MASKED_LINEARS, QKV, GatedMLP
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
    norm_epsilon=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    tie_word_embeddings=False,
    add_bias=True,
)


def mapping(kind, suffix):
    return next(m for m in parameter_map(CONFIG) if isinstance(m, kind) and m.megatron.endswith(suffix))


def test_fused_qkv_rows_go_by_query_group():
    # The row's identity is its value: 100 a projection, then head, then channel.
    query = torch.tensor([[0, head, channel] for head in range(6) for channel in range(4)])
    key = torch.tensor([[1, head, channel] for head in range(2) for channel in range(4)])
    value = torch.tensor([[2, head, channel] for head in range(2) for channel in range(4)])
    fused = mapping(QKV, "qkv.weight").to_megatron([query, key, value], CONFIG)
    expected = []
    for group in range(2):
        heads = [(0, 3 * group), (0, 3 * group + 1), (0, 3 * group + 2), (1, group), (2, group)]
        expected += [[part, head, channel] for part, head in heads for channel in range(4)]
    assert fused.tolist() == expected


def test_gated_fc1_holds_gate_rows_then_up_rows():
    gate, up = torch.arange(10), torch.arange(100, 110)
    assert mapping(GatedMLP, "fc1.bias").to_megatron([gate, up], CONFIG).tolist() == [*range(10), *range(100, 110)]


def test_every_mapping_goes_back_to_what_it_came_from():
    generator = torch.Generator().manual_seed(0)
    for each in parameter_map(CONFIG):
        parts = [torch.randn(shape, generator=generator) for shape in each.hf_shapes(CONFIG)]
        fused = each.to_megatron(parts, CONFIG)
        assert tuple(fused.shape) == each.megatron_shape(CONFIG), each.megatron
        for part, back in zip(parts, each.to_hf(fused, CONFIG), strict=True):
            assert torch.equal(part, back), each.megatron


def test_packed_bits_move_as_the_mask_does():
    each = mapping(QKV, "qkv.weight")
    mask = torch.rand(each.megatron_shape(CONFIG), generator=torch.Generator().manual_seed(0)) < 0.5
    from_bits = [unpack_mask(bits, 12) for bits in each.to_hf(pack_mask(mask), CONFIG)]
    assert all(torch.equal(a, b) for a, b in zip(from_bits, each.to_hf(mask, CONFIG), strict=True))


def test_every_linear_of_a_layer_is_masked_and_nothing_else():
    expected = {f"decoder.layers.{layer}.{linear}" for layer in range(3) for linear in MASKED_LINEARS}
    assert {m.linear for m in parameter_map(CONFIG)} - {None} == expected
