"""`prune_hf` on models of any shape, against statistics from hooks on the whole model."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from maskllm.errors import MaskLLMError
from maskllm.huggingface.blocks import block_linears, matrix
from maskllm.masking.selection import keep_of_each_block
from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, factor_hessian, prune_hf, sparsegpt, wanda_mask
from maskllm.pruning.calls import find_chains
from tests.finetuning.tiny import batches, samples, tiny_model

PATTERN = Pattern(2, 4)


def input_squares(model, data) -> dict[str, torch.Tensor]:
    """The sum of squares of each linear's inputs, fp64 [in], from forward passes of the whole model."""
    found = {}
    handles = [
        linear.register_forward_hook(
            lambda _m, args, _out, name=name: found.__setitem__(
                name, found.get(name, 0) + args[0].flatten(0, -2).double().square().sum(0)
            )
        )
        for name, linear in block_linears(model).items()
    ]
    with torch.no_grad():
        for sample in data:
            model.eval()(**sample)
    for handle in handles:
        handle.remove()
    return found


def assert_wanda(pruned, dense, squares) -> None:
    """Each linear of `pruned` that has an entry in `squares` has the Wanda mask of its dense weight."""
    assert squares
    for name, square in squares.items():
        before, after = (matrix(model.get_submodule(name)) for model in (dense, pruned))
        assert torch.equal(after, before * wanda_mask(before, square, PATTERN)), name


@pytest.mark.parametrize("name", ["t5", "whisper", "gemma3_text", "falcon", "mpt", "vit", "gpt2"])
def test_each_linear_is_calibrated_on_what_it_sees_in_the_dense_model(name):
    model, data = tiny_model(name), batches(samples(name, 3))
    dense = copy.deepcopy(model)
    result = prune_hf(model, data, PruneSettings("wanda", PATTERN, sequential=False))
    assert_wanda(model, dense, input_squares(dense, data))
    for parameter, mask in result.unpacked(model).items():
        weight = model.get_parameter(parameter)
        assert mask.shape == weight.shape and torch.equal(weight != 0, mask & (weight != 0)), parameter
    assert [layer["layer"] for layer in result.report["layers"]] == list(range(len(result.report["layers"])))
    assert result.report["calibration"] == {"samples": 3}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_is_calibrated_on_the_pruned_encoder(name):
    model, data = tiny_model(name), batches(samples(name, 3))
    dense = copy.deepcopy(model)
    prune_hf(model, data, PruneSettings("wanda", PATTERN))
    last = {"t5": "decoder.block.1.", "bart": "model.decoder.layers.1."}[name]
    reference = copy.deepcopy(model)  # all but the last block is pruned
    for linear in block_linears(reference):
        if linear.startswith(last):
            reference.get_submodule(linear).load_state_dict(dense.get_submodule(linear).state_dict())
    assert_wanda(model, dense, {key: value for key, value in input_squares(reference, data).items() if key.startswith(last)})


def test_an_encoder_and_a_decoder_are_two_chains():
    model = tiny_model("t5")
    (sample,) = batches(samples("t5", 1))
    chains = find_chains(model, block_linears(model), sample)
    assert [list(chain.blocks) for chain in chains] == [
        [f"{side}.block.{index}" for index in (0, 1)] for side in ("encoder", "decoder")
    ]
    with pytest.raises(MaskLLMError, match="calibration: the inputs pixels reach no block of _Branching"):
        find_chains(_Branching(), {"blocks.0.linear": None}, {"pixels": torch.ones(1, 8)})


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, *, depth: int, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + depth * self.linear(self.norm(hidden_states))


class _Branching(PreTrainedModel):
    """Blocks 0 and 1 are a chain, 2 gets something else than the output of 1, 3 is called twice, and 4 never."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.blocks = nn.ModuleList([_Block() for _ in range(5)])
        self.post_init()

    def forward(self, inputs: torch.Tensor | None = None, pixels: torch.Tensor | None = None) -> SimpleNamespace:
        if pixels is not None:
            return SimpleNamespace(logits=pixels)
        hidden = inputs
        for depth, block in enumerate(self.blocks[:4]):
            hidden = block(depth=depth + 1, hidden_states=hidden if depth != 2 else hidden.tanh())
        return SimpleNamespace(logits=self.blocks[3](depth=7, hidden_states=hidden))


@pytest.mark.parametrize("sequential", [True, False])
def test_blocks_that_are_no_chain(sequential, caplog):
    torch.manual_seed(0)
    model = _Branching()
    data = [{"inputs": torch.randn(1, 5, 8)} for _ in range(3)]
    dense = copy.deepcopy(model)
    chains = find_chains(model, block_linears(model), data[0])
    assert [list(chain.blocks) for chain in chains] == [["blocks.0", "blocks.1"], ["blocks.2"], ["blocks.3"], ["blocks.4"]]
    prune_hf(model, data, PruneSettings("wanda", PATTERN, sequential=sequential))
    for index in range(4):
        reference = copy.deepcopy(dense)
        if sequential:
            for before in range(index):
                reference.blocks[before].load_state_dict(model.blocks[before].state_dict())
        name = f"blocks.{index}.linear"
        assert_wanda(model, dense, {name: input_squares(reference, data)[name]})
    assert "blocks.4.linear: reached by no calibration sample" in caplog.text
    assert (model.blocks[4].linear.weight == 0).float().mean() == 0.5


def test_rungs_keep_zeros_zero():
    model, data = tiny_model("llama"), batches(samples("llama", 8, padded=False))
    settings = PruneSettings("sparsegpt", 0.5, update_weights=True, zeros_stay=True)
    zeros = {name: torch.zeros(matrix(linear).shape, dtype=torch.bool) for name, linear in block_linears(model).items()}
    for sparsity in (0.5, 0.67, 0.75):
        report = prune_hf(model, data, dataclasses.replace(settings, sparsity=sparsity)).report
        assert report["zeros_stay"]
        for name, linear in block_linears(model).items():
            found = matrix(linear) == 0
            assert found.float().mean() == pytest.approx(sparsity, abs=0.01)
            assert not (zeros[name] & ~found).any(), name
            zeros[name] = found


@pytest.mark.parametrize("sparsity", [0.6, Pattern(1, 4)])
def test_updates_reach_zeros_unless_they_are_removed_first(sparsity):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 8, generator=generator) @ torch.randn(8, 256, generator=generator)
    factor = factor_hessian(inputs.T @ inputs, "weight")
    weight = torch.randn(32, 256, generator=generator)
    weight *= keep_of_each_block(weight.abs(), PATTERN)
    free, _ = sparsegpt(weight, factor, sparsity)
    held, updated = sparsegpt(weight, factor, sparsity, weight == 0)
    assert (free & (weight == 0)).any(), "the inputs are not alike enough"
    assert not (held & (weight == 0)).any()
    assert torch.equal(updated != 0, held)


def test_a_batch_counts_each_of_its_tokens():
    model, data = tiny_model("llama"), samples("llama", 4, padded=False)
    other = copy.deepcopy(model)
    alone = prune_hf(model, batches(data), PruneSettings("wanda", PATTERN)).masks
    joined = {name: torch.stack([sample[name] for sample in data]) for name in data[0]}
    together = prune_hf(other, [joined], PruneSettings("wanda", PATTERN)).masks
    assert all(torch.equal(together[name], mask) for name, mask in alone.items())
    with pytest.raises(MaskLLMError, match="calibration: no samples"):
        prune_hf(model, [])
