"""A layer whose linears do not all see every sample, as in a mixture of experts.

usage: ranks(N, "tests.pruning.experts", FILE) prunes it in N processes; the first writes masks and weights to FILE
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import distributed as dist

from maskllm.patterns import Pattern
from maskllm.pruning.layerwise import Layer, prune_layers
from maskllm.pruning.solve import PrunedMatrix, PruneSettings

WIDTH = 16
NAMES = ("gate", "up", "first", "second", "twice", "narrow", "never")


class Experts(torch.nn.Module):
    """A sample's first number says which linears read which tensor."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in NAMES:
            linear = torch.nn.Linear(8 if name == "narrow" else WIDTH, WIDTH, bias=False)
            linear.weight.data = torch.randn(linear.weight.shape, generator=generator)
            self.add_module(name, linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        kind = int(hidden[0, 0, 0])
        if kind == 0:
            sums = self.gate(hidden) + self.up(hidden) + self.first(hidden)
        elif kind == 1:  # the other order
            sums = self.up(hidden) + self.gate(hidden) + self.second(hidden)
        else:  # different tensors
            sums = self.first(hidden) + self.up(hidden.sin()) + self.gate(hidden.cos())
        return sums + self.twice(self.twice(hidden)) + self.narrow(hidden[..., :8])


def experts_layer() -> Layer:
    """The layer, always with the same weights."""
    module = Experts()
    linears = dict(module.named_children())
    return Layer(lambda _, hidden: module(hidden), linears, {name: linear.weight.data for name, linear in linears.items()})


def samples(kinds: list[int]) -> list[torch.Tensor]:
    """A sample [1, tokens, WIDTH] of each kind."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for kind in kinds:
        sample = torch.randn(1, 24, WIDTH, generator=generator)
        sample[0, 0, 0] = kind
        found.append(sample)
    return found


class Results:
    """A `LayerStore` that keeps the pruned matrices of the one layer."""

    finished: frozenset[int] = frozenset()
    pruned: dict[str, PrunedMatrix]

    def load(self, index: int) -> dict[str, PrunedMatrix]:
        raise KeyError(index)

    def save(self, index: int, pruned: dict[str, PrunedMatrix]) -> None:
        self.pruned = pruned


def prune_experts(kinds: list[int], settings: PruneSettings, *, rank: int = 0, group: Any = None) -> dict[str, PrunedMatrix]:
    """The layer's matrices, pruned on samples of `kinds`, which the ranks of `group` split."""
    store = Results()
    ranks = 1 if group is None else group.size()
    prune_layers([experts_layer()], 1, samples(kinds)[rank::ranks], settings, store=store, group=group)
    return store.pruned


SETTINGS = PruneSettings("sparsegpt", Pattern(2, 4), update_weights=True)
APART = [0, 1, 0, 1, 0, 2]
"""Kinds of samples. Of two ranks, the first sees other linears reading together than the second."""

if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = prune_experts(APART, SETTINGS, rank=dist.get_rank(), group=dist.group.WORLD)
    if dist.get_rank() == 0:
        torch.save({name: (one.mask, one.weight, one.report["calibration_tokens"]) for name, one in found.items()}, sys.argv[1])
    dist.destroy_process_group()
