"""Calibration of a layer whose linears do not all see every sample."""

import logging

import pytest
import torch

from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, magnitude_mask
from maskllm.pruning.layerwise import calibrate
from maskllm.pruning.statistics import InputStatistics
from tests.pruning.experts import APART, NAMES, SETTINGS, experts_layer, prune_experts, samples


def of_each_linear(kinds):
    """The statistics of each linear alone, from hooks."""
    layer = experts_layer()
    alone = {name: InputStatistics(weight.shape[1]) for name, weight in layer.stored.items()}
    for name, linear in layer.linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: alone[name].add(args[0]))
    for sample in samples(kinds):
        layer.forward(0, sample)
    return alone


@pytest.mark.parametrize("kinds", [[0, 0], [0, 1, 0], [1, 2], [2, 1, 0, 0], [0, 1, 2, 2]])
def test_a_linear_has_all_of_its_inputs_whichever_others_read_them(kinds):
    found, alone = calibrate(experts_layer(), samples(kinds), keep_outputs=False), of_each_linear(kinds)
    assert found.keys() == set(NAMES)
    for name, own in found.items():
        assert (own.samples, own.tokens) == (alone[name].samples, alone[name].tokens), name
        assert torch.equal(own.gram.tril(), alone[name].gram.tril()), name
    assert found["twice"].samples == 2 * len(kinds)
    assert (found["gate"] is found["up"]) == (2 not in kinds), "what reads the same tensors shares one object"


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_linear_that_no_sample_reaches_is_named_and_pruned_by_magnitude(method, caplog):
    with caplog.at_level(logging.WARNING):
        pruned = prune_experts([0, 0, 0], PruneSettings(method, Pattern(2, 4), update_weights=method == "sparsegpt"))
    assert "second, never: reached by no calibration sample" in caplog.text
    for name, weight in experts_layer().stored.items():
        assert pruned[name].report["calibration_tokens"] == {"second": 0, "never": 0, "twice": 144}.get(name, 72)
        if name in ("second", "never"):
            expected = magnitude_mask(weight, Pattern(2, 4))
            assert torch.equal(pruned[name].mask, expected)
            if method == "sparsegpt":
                assert torch.equal(pruned[name].weight, weight * expected), "nothing moves"


@pytest.mark.slow
def test_ranks_whose_samples_reach_other_linears_agree(ranks, tmp_path):
    """Bit for bit what one process finds."""
    ranks(2, "tests.pruning.experts", tmp_path / "pruned.pt")
    found, expected = torch.load(tmp_path / "pruned.pt", weights_only=True), prune_experts(APART, SETTINGS)
    assert found.keys() == expected.keys()
    for name, (mask, weight, tokens) in found.items():
        assert tokens == expected[name].report["calibration_tokens"], name
        assert torch.equal(mask, expected[name].mask) and torch.equal(weight, expected[name].weight), name
