"""Masked linears in a transformers model, compared with plain torch, and with Megatron's frame on the same model and draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import load_model, resolve
from maskllm.errors import MaskLLMError
from maskllm.families.registry import parameter_map
from maskllm.huggingface import sparsify
from maskllm.huggingface.masked_linear import MaskedLinear
from maskllm.masking.draw import Draw, keep_draw, open_draw
from maskllm.masking.parameter import Location, use_winners
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model
from maskllm.megatron.linears import attach_logits, masked_parameters
from maskllm.megatron.process_groups import parallel_processes
from maskllm.ops import NoiseKey, masked_weight, philox_key
from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, prune_hf
from tests.families.tiny import CONFIGS, SIZES, tiny_model, write_tiny

SAMPLE = 3


@pytest.fixture
def sampler() -> MaskSampler:
    return MaskSampler(Pattern(2, 4), seed=7, scale=100.0, temperature=2.0, weight_reg=1e-4)


def sparsified(model, sampler, **options):
    """The masked weights of `model`, which draw as `sampler` says."""
    masked = sparsify(model, sampler.pattern, seed=sampler.seed, **options)
    for parameter in masked.values():
        parameter.sampler = sampler
    return masked


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_a_pruned_model_draws_masks_and_backpropagates(name, sampler):
    """A linear multiplies by the weight that the operator gives for its name, and only the logits get gradients."""
    model = tiny_model(name)
    tokens = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(0))
    masks = prune_hf(model, tokens, PruneSettings("wanda")).masks
    masked = sparsified(model, sampler)
    assert {f"{linear}.weight" for linear in masked} == set(masks)
    for linear, parameter in masked.items():
        parameter.attach_bits()
        parameter.bits.copy_(masks[f"{linear}.weight"])
        parameter.reset(prior_strength=30.0)
        assert torch.equal(parameter.winner_bits(), masks[f"{linear}.weight"])

    linear, parameter = list(masked.items())[1]
    module = model.get_submodule(linear)
    inputs = torch.randn(5, parameter.shape[1])
    with open_draw(Draw(SAMPLE)):
        found = module(inputs)
        loss = model(tokens, labels=tokens).loss
    key = NoiseKey(philox_key(sampler.seed, linear), SAMPLE, parameter.shard)
    weight = masked_weight(parameter.weight, parameter.logits, pattern=sampler.pattern, key=key, scale=100.0, temperature=2.0)
    torch.testing.assert_close(found, F.linear(inputs, weight, module.bias), rtol=0, atol=0)
    loss.backward()
    for name_, tensor in model.named_parameters():
        assert (tensor.grad is not None and bool(tensor.grad.any())) == name_.endswith("mask_logits"), name_


def test_without_an_open_draw_a_forward_pass_says_what_is_missing(sampler):
    model = tiny_model("llama2")
    masked = sparsified(model, sampler)
    with pytest.raises(RuntimeError, match="no draw of masks is open"):
        model(torch.zeros(1, 4, dtype=torch.long))
    with use_winners(list(masked.values())):
        model(torch.zeros(1, 4, dtype=torch.long))


def test_a_pattern_that_does_not_fit_names_the_linear():
    with pytest.raises(MaskLLMError, match=r"model\.layers\.0\.self_attn\.q_proj: its .* 32 is not a multiple of 5"):
        sparsify(tiny_model("llama2"), Pattern(2, 5))


@pytest.mark.parametrize(
    "frame",
    [
        lambda model: sparsify(model, "2:4"),
        lambda model: prune_hf(model, torch.zeros(1, 4, dtype=torch.long)),
    ],
)
@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SIZES, num_local_experts=4),
        Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, head_dim=8),
    ],
)
def test_a_mixture_of_experts_is_refused_by_name(frame, config):
    """transformers 5 holds the experts' weights in parameters that are no linear's. They would stay dense."""
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        MaskLLMError, match=rf"{type(model).__name__}: model\.layers\.0\.mlp\.experts\.\w+ is .* mixture of experts is"
    ):
        frame(model)


@pytest.mark.parametrize("recompute_masked_weight", [False, True])
def test_recomputation_draws_the_same_masks(recompute_masked_weight, sampler):
    """torch's activation checkpointing, with the backward pass in another draw than the forward pass."""
    sampler.recompute_masked_weight = recompute_masked_weight
    linear = torch.nn.Linear(16, 8).requires_grad_(False)
    module = MaskedLinear(linear, Location("linear", 16))
    module.masked.attach_logits(sampler)
    module.masked.reset()
    inputs = torch.randn(3, 16, requires_grad=True)

    def gradient(forward) -> torch.Tensor:
        module.mask_logits.grad = None
        sampler.stats = torch.zeros(2)
        with open_draw(Draw(SAMPLE)):
            output = forward(inputs)
        with open_draw(Draw(SAMPLE + 1)):
            output.square().sum().backward()
        return module.mask_logits.grad

    expected = gradient(module)
    stats = sampler.stats
    found = gradient(lambda x: checkpoint(keep_draw(module), x, use_reentrant=False))
    assert torch.equal(found, expected) and expected.any()
    assert torch.equal(sampler.stats, stats), "a recomputed draw was counted twice"


def fused_locations(model: PreTrainedModel, config) -> dict[str, Location]:
    """For every Hugging Face linear, the Megatron weight that its rows are a contiguous part of (one query group)."""
    found = {}
    for mapping in parameter_map(config):
        if mapping.linear is not None:
            row = 0
            for name, rows in zip(mapping.hf, mapping.rows(config), strict=True):
                columns = mapping.megatron_shape(config)[1]
                found[name.removesuffix(".weight")] = Location(mapping.linear, columns, row_offset=row)
                row += rows
    return found


@pytest.mark.parametrize("name", ["one_group", "gpt2"])
def test_both_frames_compute_the_same_losses_and_gradients(name, sampler, tmp_path, monkeypatch):
    """Megatron fuses linears that transformers keeps apart. A draw depends only on the place of a weight."""
    monkeypatch.setitem(CONFIGS, "one_group", CONFIGS["llama2"] | {"num_key_value_heads": 1})
    monkeypatch.setitem(CONFIGS, "gpt2", CONFIGS["gpt2"] | {"n_head": 1})
    model = write_tiny(name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    dense = resolve(tmp_path / "dense")
    config = dense.model_config
    tokens = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(1))

    sampler.stats = torch.zeros(2)
    plain = sparsified(model, sampler, locations=fused_locations(model, config))
    with open_draw(Draw(SAMPLE)):
        logits = model(tokens[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, -1)
    losses.mean().backward()
    stats = sampler.stats

    sampler.stats = torch.zeros(2)
    with parallel_processes():
        megatron = build_model(config, params_dtype=torch.float32)
        load_model(dense, megatron)
        attach_logits(megatron, sampler)
        fused = masked_parameters(megatron)
        for parameter in fused:
            parameter.reset()
        positions = torch.arange(32).expand(2, -1)
        with open_draw(Draw(SAMPLE)):
            found = megatron(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
        found.mean.backward()

    torch.testing.assert_close(found.cross_entropy, losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampler.stats, stats, rtol=1e-5, atol=0)
    by_name = {parameter.location.name: parameter for parameter in fused}
    for mapping in parameter_map(config):
        if mapping.linear is not None:
            parts = [plain[name.removesuffix(".weight")] for name in mapping.hf]
            whole = by_name[mapping.linear]
            assert torch.equal(whole.logits, mapping.fuse([part.logits for part in parts], config)), mapping.linear
            gradient = mapping.fuse([part.logits.grad for part in parts], config)
            torch.testing.assert_close(whole.logits.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_a_conv1d_keeps_its_parameters(sampler):
    model = tiny_model("gpt2")
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    conv = model.transformer.h[0].mlp.c_fc
    assert isinstance(conv, Conv1D)
    sparsified(model, sampler)
    after = {name: tensor.data_ptr() for name, tensor in model.named_parameters() if not name.endswith("mask_logits")}
    assert after == before
