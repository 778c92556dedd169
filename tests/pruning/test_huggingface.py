"""`prune_hf` on small models, against statistics from hooks on the whole model."""

import copy
import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from maskllm.errors import MaskLLMError
from maskllm.patterns import Pattern, unpack_mask
from maskllm.pruning import PruneSettings, magnitude_mask, prune_hf, wanda_mask

PATTERN = Pattern(2, 4)
MATRICES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def tokens(samples=6, length=20):
    return torch.randint(0, 64, (samples, length), generator=torch.Generator().manual_seed(3))


def linear_inputs(model, input_ids, layer):
    """The inputs [tokens, in] of one layer's linears, from a forward pass of the whole model over the whole batch."""
    seen, handles = {}, []
    for name in MATRICES:
        module = model.model.layers[layer].get_submodule(name)
        handles.append(module.register_forward_hook(lambda _m, args, _out, name=name: seen.update({name: args[0].flatten(0, 1)})))
    with torch.no_grad():
        model(input_ids)
    for handle in handles:
        handle.remove()
    return seen


def weight_of(model, layer, name):
    return model.model.layers[layer].get_submodule(name).weight.detach()


def masks_of(result, layer):
    return {name: result.masks[f"model.layers.{layer}.{name}.weight"] for name in MATRICES}


@pytest.mark.parametrize("sequential", [True, False])
def test_wanda_calibrates_each_layer_on_pruned_or_dense_predecessors(sequential):
    model, input_ids = tiny_llama(), tokens()
    dense = copy.deepcopy(model)
    result = prune_hf(model, input_ids, PruneSettings("wanda", PATTERN, sequential=sequential))
    for layer in range(3):
        reference = copy.deepcopy(dense)
        if sequential:  # the layers before this one are pruned
            for before in range(layer):
                reference.model.layers[before].load_state_dict(model.model.layers[before].state_dict())
        inputs = linear_inputs(reference, input_ids, layer)
        for name, bits in masks_of(result, layer).items():
            weight = weight_of(dense, layer, name)
            expected = wanda_mask(weight, inputs[name].double().square().sum(0), PATTERN)
            assert torch.equal(unpack_mask(bits, weight.shape[1]), expected), (layer, name)
            assert torch.equal(weight_of(model, layer, name), weight * expected)


@pytest.mark.parametrize("method, update", [("magnitude", False), ("wanda", False), ("sparsegpt", False), ("sparsegpt", True)])
def test_reports_the_relative_output_error(method, update):
    model, input_ids = tiny_llama(1), tokens()
    dense = copy.deepcopy(model)
    result = prune_hf(model, input_ids, PruneSettings(method, PATTERN, update_weights=update))
    for layer in range(3):
        reference = copy.deepcopy(dense)
        for before in range(layer):
            reference.model.layers[before].load_state_dict(model.model.layers[before].state_dict())
        inputs = linear_inputs(reference, input_ids, layer)
        for name in MATRICES:
            before, after = weight_of(dense, layer, name), weight_of(model, layer, name)
            expected = ((before - after) @ inputs[name].T).norm() / (before @ inputs[name].T).norm()
            report = result.report["layers"][layer]["matrices"][f"model.layers.{layer}.{name}"]
            assert report["relative_error"] == pytest.approx(expected.item(), rel=1e-3)
            assert report["kept"] == 0.5
            assert (after.unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()


@pytest.mark.parametrize("sparsity", [PATTERN, 0.5])
def test_gpt2_is_pruned_along_its_inputs(sparsity):
    """GPT-2 stores weights as [in, out]: an input is a row, and a 2:4 block is part of a column."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=4,
        n_inner=48,
        vocab_size=64,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, input_ids = GPT2LMHeadModel(config).eval(), tokens()
    dense, seen = copy.deepcopy(model), {}
    names = [
        f"transformer.h.{layer}.{name}" for layer in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    for name in names:
        dense.get_submodule(name).register_forward_hook(
            lambda _m, args, _out, name=name: seen.update({name: args[0].flatten(0, 1)})
        )
    with torch.no_grad():
        dense(input_ids)
    result = prune_hf(model, input_ids, PruneSettings("wanda", sparsity, sequential=False))
    assert sorted(result.masks) == sorted(f"{name}.weight" for name in names)
    for name in names:
        before = dense.get_submodule(name).weight.detach()
        mask = unpack_mask(result.masks[f"{name}.weight"], before.shape[0])
        assert torch.equal(mask, wanda_mask(before.t(), seen[name].double().square().sum(0), sparsity)), name
        assert torch.equal(model.get_submodule(name).weight, before * mask.t()), name
    updated = prune_hf(copy.deepcopy(dense), input_ids, PruneSettings("sparsegpt", sparsity, update_weights=True)).report
    plain = prune_hf(copy.deepcopy(dense), input_ids, PruneSettings("sparsegpt", sparsity)).report
    for name, matrix in updated["layers"][0]["matrices"].items():
        assert matrix["kept"] == 0.5
        assert matrix["relative_error"] < plain["layers"][0]["matrices"][name]["relative_error"]


def test_updated_weights_have_a_smaller_output_error():
    errors = {}
    for update in (False, True):
        model = tiny_llama(2)
        report = prune_hf(model, tokens(), PruneSettings("sparsegpt", PATTERN, update_weights=update)).report
        errors[update] = [matrix["relative_error"] for matrix in report["layers"][0]["matrices"].values()]
    assert all(with_update < without for with_update, without in zip(errors[True], errors[False], strict=True))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_unstructured_sparsity_removes_its_share(method):
    model = tiny_llama()
    report = prune_hf(model, tokens(), PruneSettings(method, 0.75)).report
    assert report["sparsity"] == 0.75
    for layer in report["layers"]:
        assert all(matrix["kept"] == pytest.approx(0.25, abs=0.01) for matrix in layer["matrices"].values())


def test_bf16_weights_stay_bf16_and_no_other_parameter_changes():
    model = tiny_llama().bfloat16().train()
    before = copy.deepcopy(model.state_dict())
    prune_hf(model, tokens(), PruneSettings("sparsegpt", PATTERN, update_weights=True))
    assert model.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]) == (not name.endswith("_proj.weight"))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_token_with_nan_is_skipped_and_reported(method, caplog):
    model, input_ids = tiny_llama(), tokens()
    input_ids[input_ids == 7] = 8
    clean = masks_of(prune_hf(copy.deepcopy(model), input_ids[1:], PruneSettings(method, PATTERN)), 0)
    model.model.embed_tokens.weight.data[7] = float("nan")
    input_ids[0, 12] = 7  # attention spreads it over its whole sample: 0 * NaN is NaN
    with caplog.at_level(logging.WARNING):
        result = prune_hf(model, input_ids, PruneSettings(method, PATTERN))
    assert "model.layers.0.self_attn.q_proj" in caplog.text and "non-finite" in caplog.text
    skipped = {name: result.report["layers"][0]["matrices"][f"model.layers.0.{name}"]["skipped_tokens"] for name in MATRICES}
    for name, bits in masks_of(result, 0).items():
        if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            assert skipped[name] == 1
        else:
            assert skipped[name] == 20
            assert torch.equal(bits, clean[name]), name


def test_without_a_finite_token_sparsegpt_uses_magnitudes(caplog):
    model = tiny_llama()
    weights = {name: weight_of(model, 0, name).clone() for name in MATRICES}
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    with caplog.at_level(logging.WARNING):
        result = prune_hf(model, tokens(), PruneSettings("sparsegpt", PATTERN, update_weights=True))
    assert "no calibration token has finite inputs" in caplog.text
    for name, bits in masks_of(result, 0).items():
        expected = magnitude_mask(weights[name], PATTERN)
        assert torch.equal(unpack_mask(bits, weights[name].shape[1]), expected)
        torch.testing.assert_close(weight_of(model, 0, name), weights[name] * expected)


def test_dead_inputs_are_counted_and_reported(caplog):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[[4, 9]] = 0
    with caplog.at_level(logging.WARNING):
        result = prune_hf(model, tokens(), PruneSettings("sparsegpt", PATTERN, update_weights=True))
    assert "model.layers.1.self_attn.q_proj" in caplog.text and "2 of 32 inputs are 0" in caplog.text
    matrices = result.report["layers"][1]["matrices"]
    assert matrices["model.layers.1.self_attn.k_proj"]["dead_inputs"] == 2
    assert matrices["model.layers.1.mlp.up_proj"]["dead_inputs"] == 0
    assert (weight_of(model, 1, "self_attn.q_proj")[:, [4, 9]] == 0).all()


def test_models_and_settings_that_cannot_be_pruned_are_refused():
    model = tiny_llama()
    with pytest.raises(MaskLLMError, match=r"no stack of blocks"):
        prune_hf(LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=0, num_attention_heads=2)), tokens())
    with pytest.raises(MaskLLMError, match=r"layers\.0\.self_attn\.q_proj.*multiple of 5"):
        prune_hf(model, tokens(), PruneSettings("wanda", Pattern(2, 5)))
    with pytest.raises(MaskLLMError, match="shape"):
        prune_hf(model, tokens()[0])
    model.model.layers[2].mlp.up_proj.weight.data[5, 7] = float("inf")
    with pytest.raises(MaskLLMError, match=r"layers\.2\.mlp\.up_proj: weight \[5, 7\] is inf"):
        prune_hf(model, tokens())
    with pytest.raises(MaskLLMError, match="wanted one of magnitude, wanda, sparsegpt"):
        PruneSettings("random")
    with pytest.raises(MaskLLMError, match="needs sparsegpt"):
        PruneSettings("wanda", update_weights=True)
