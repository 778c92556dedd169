"""Prune a model one transformer layer at a time: calibrate the layer, solve its matrices, pass its outputs to the next layer.

`prune_layers` serves models in memory and checkpoints. It needs memory for the statistics of one layer, the layer's inputs for one
sample, and the hidden states of all samples between two layers. Those stay on the host in the model's dtype.

Each parallel rank holds the whole current layer. The ranks split the samples, sum the statistics, and solve different matrices. A
sample passes through a layer alone and one rank solves a matrix, so the masks do not depend on the number of ranks.
"""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import distributed as dist
from tqdm import tqdm

from maskllm.huggingface.blocks import as_matrix, matrix
from maskllm.patterns import pack_mask, unpack_mask
from maskllm.pruning.solve import PrunedMatrix, PruneSettings, prune_matrices
from maskllm.pruning.statistics import InputStatistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layer:
    """A transformer layer: `forward` maps the number of a sample and its hidden states to the next layer's hidden states, `linears` are
    the modules to prune.

    The keys of `linears` are the names in reports. The modules are of the kinds that `maskllm.huggingface.blocks.matrix` supports;
    their first positional argument is their input.
    """

    forward: Callable[[int, torch.Tensor], torch.Tensor]
    linears: dict[str, torch.nn.Module]
    stored: dict[str, torch.Tensor]
    """The weights [out, in] of `linears` as they are stored, each in its own dtype, on any device. They are what is pruned; the layer
    may compute in another dtype."""

    @property
    def device(self) -> torch.device:
        """The device that the layer computes on."""
        return next(iter(self.linears.values())).weight.device

    def weight(self, name: str) -> torch.Tensor:
        """A view [out, in] of a linear's weight. Writing to it changes the layer."""
        return matrix(self.linears[name])


class LayerStore(Protocol):
    """Stores finished layers, so that an interrupted run can continue after the last one."""

    finished: Set[int]
    """The layers that an earlier run has saved."""

    def load(self, index: int) -> dict[str, PrunedMatrix]:
        """The matrices of a finished layer, as `save` got them."""

    def save(self, index: int, pruned: dict[str, PrunedMatrix]) -> None:
        """Store the matrices of a finished layer."""


@torch.no_grad()
def prune_layers(
    layers: Iterable[Layer],
    num_layers: int,
    hidden: list[torch.Tensor],
    settings: PruneSettings,
    *,
    store: LayerStore,
    group: dist.ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    """Prune each layer in place and store it; returns a report (JSON values) per layer.

    Standard error shows the progress, with the relative error of each matrix's outputs: a bar on a terminal, else a line a layer.

    Args:
        layers: may load its layers one at a time.
        num_layers: the number of layers.
        hidden: this rank's samples as inputs of the first layer, [1, sequence, hidden size] each, on the host; overwritten.
        settings: with `sequential`, a layer's inputs come from the pruned layers before it, as in the papers; otherwise from the
            dense model.
        store: where finished layers are stored.
        group: the ranks that work together; None for one process.
    """
    reports = []
    last_to_solve = max((index for index in range(num_layers) if index not in store.finished), default=-1)
    is_silent = group is not None and group.rank() != 0
    progress = tqdm(layers, total=num_layers, desc="prune", unit="layer", disable=is_silent or None)
    for index, layer in enumerate(progress):
        report = _prune_layer(layer, index, hidden, settings, store, group, outputs_wanted=index < last_to_solve)
        reports.append(report)
        where, labels = _short_names(list(report["matrices"]))
        errors = {label: report["matrices"][name]["relative_error"] for name, label in labels.items()}
        shown = " ".join(f"{label} {error:.3f}" for label, error in errors.items() if error is not None)
        progress.set_postfix_str(shown)
        if progress.disable and not is_silent:
            print(f"prune: layer {index + 1} of {num_layers}, {where}{shown and ': '}{shown}", file=sys.stderr, flush=True)
    return reports


def _short_names(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """What the dotted names of a layer's matrices begin with, and for each the shortest end that no other has."""
    parts = [name.split(".") for name in names]
    common = [
        same[0] for same in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*(own[:-1] for own in parts), strict=False))
    ]
    labels = {}
    for name, own in zip(names, parts, strict=True):
        length = next(k for k in range(1, len(own) + 1) if sum(other[-k:] == own[-k:] for other in parts) == 1)
        labels[name] = ".".join(own[-length:])
    return ".".join(common), labels


def _prune_layer(
    layer: Layer,
    index: int,
    hidden: list[torch.Tensor],
    settings: PruneSettings,
    store: LayerStore,
    group: dist.ProcessGroup | None,
    *,
    outputs_wanted: bool,
) -> dict[str, Any]:
    """Prune one layer. With `outputs_wanted`, its outputs replace the samples in `hidden`."""
    started = time.perf_counter()
    solve_seconds = 0.0
    resumed = index in store.finished
    if resumed:
        pruned = store.load(index)
        if outputs_wanted and not settings.sequential:
            advance(layer, hidden)
    else:
        statistics = calibrate(layer, hidden, keep_outputs=outputs_wanted and not settings.sequential)
        solve_started = time.perf_counter()
        pruned = _solve(layer, statistics, settings, group)
        solve_seconds = time.perf_counter() - solve_started
        store.save(index, pruned)
    for name, solved in pruned.items():
        solved.apply(layer.weight(name))
    if outputs_wanted and settings.sequential:
        advance(layer, hidden)
    return {
        "layer": index,
        "seconds": time.perf_counter() - started,
        "solve_seconds": solve_seconds,
        "resumed": resumed,
        "matrices": {name: solved.report for name, solved in pruned.items()},
    }


def calibrate(layer: Layer, hidden: list[torch.Tensor], *, keep_outputs: bool) -> dict[str, InputStatistics]:
    """The input statistics of each of the layer's linears over this rank's samples.

    Linears that read the same tensors in every sample share one object. A linear that no sample reaches has statistics of 0 samples.
    With `keep_outputs`, the layer's outputs replace the samples in `hidden`.
    """
    inputs: dict[str, list[torch.Tensor]] = {}

    def capture(name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, args: tuple) -> None:
            inputs.setdefault(name, []).append(args[0])

        return hook

    widths = {name: weight.shape[1] for name, weight in layer.stored.items()}
    empty = {width: InputStatistics(width, layer.device) for width in widths.values()}
    statistics = {name: empty[width] for name, width in widths.items()}
    del empty
    handles = [linear.register_forward_pre_hook(capture(name)) for name, linear in layer.linears.items()]
    try:
        for index, sample in enumerate(hidden):
            output = layer.forward(index, sample.to(layer.device))
            if keep_outputs:
                hidden[index] = output.cpu()
            _add_inputs(statistics, inputs)
            inputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def _add_inputs(statistics: dict[str, InputStatistics], inputs: dict[str, list[torch.Tensor]]) -> None:
    """Add one sample's `inputs` of each linear that it reached. Linears that so far read the same tensors, but now do not, part."""
    readers: dict[tuple[int, ...], list[str]] = {}
    for name, own in statistics.items():
        readers.setdefault((id(own), *map(id, inputs.get(name, []))), []).append(name)
    for names in readers.values():
        if names[0] not in inputs:
            continue
        own = statistics[names[0]]
        if sum(other is own for other in statistics.values()) > len(names):
            own = own.copy()
            statistics.update(dict.fromkeys(names, own))
        for tensor in inputs[names[0]]:
            own.add(tensor)


def advance(layer: Layer, hidden: list[torch.Tensor]) -> None:
    """Replace the samples in `hidden` by the layer's outputs."""
    for index, sample in enumerate(hidden):
        hidden[index] = layer.forward(index, sample.to(layer.device)).cpu()


def _solve(
    layer: Layer,
    statistics: dict[str, InputStatistics],
    settings: PruneSettings,
    group: dist.ProcessGroup | None,
) -> dict[str, PrunedMatrix]:
    """Prune the layer's matrices, and empty `statistics`. Matrices with the same input are solved together, on one of the ranks."""
    pruned: dict[str, PrunedMatrix] = {}
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    # Largest first: the cost grows with the cube of the number of inputs.
    groups = sorted(_groups(statistics, group), key=lambda names: -len(statistics[names[0]].gram))
    of_groups = [statistics[names[0]] for names in groups]
    statistics.clear()
    if group is not None:
        # Each is reduced in place, so groups that only other ranks tell apart need copies.
        of_groups = [own.copy() if own in of_groups[:position] else own for position, own in enumerate(of_groups)]
        for position in range(len(groups)):
            of_groups[position].reduce(position % ranks, group)
    for position, names in enumerate(groups):
        own = of_groups.pop(0)  # frees the one before
        if position % ranks == rank:
            weights = {name: layer.stored[name].to(layer.device) for name in names}
            pruned.update(prune_matrices(weights, own, settings, _given_masks(layer, names, settings)))
    if group is not None:
        for position, names in enumerate(groups):
            for name in names:
                pruned[name] = _broadcast(layer, name, pruned.get(name), position % ranks, settings, group)
    return {name: pruned[name] for name in layer.linears}


def _given_masks(layer: Layer, names: Iterable[str], settings: PruneSettings) -> dict[str, torch.Tensor] | None:
    """The masks [out, in] of the layer's linears `names` in the settings' mask file, on the layer's device; None without a file."""
    if settings.mask_file is None:
        return None
    masks = {}
    for name in names:
        linear = layer.linears[name]
        masks[name] = as_matrix(linear, settings.mask_file.mask(f"{name}.weight", tuple(linear.weight.shape))).to(layer.device)
    return masks


def _groups(statistics: dict[str, InputStatistics], group: dist.ProcessGroup | None) -> list[list[str]]:
    """The linears that share their statistics on every rank, in the same order on every rank."""
    numbers = {name: id(own) for name, own in statistics.items()}
    everywhere = [numbers]
    if group is not None:
        everywhere = [numbers] * group.size()
        dist.all_gather_object(everywhere, numbers, group=group)
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in statistics:
        groups.setdefault(tuple(of_rank[name] for of_rank in everywhere), []).append(name)
    return list(groups.values())


def _broadcast(
    layer: Layer, name: str, solved: PrunedMatrix | None, source: int, settings: PruneSettings, group: dist.ProcessGroup
) -> PrunedMatrix:
    """Send the matrix `name` of `layer`, which rank `source` has `solved`, to every rank."""
    stored = layer.stored[name]
    out_features, in_features = stored.shape
    empty = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8, device=layer.device)
    bits = pack_mask(solved.mask) if solved else empty
    report = [solved.report if solved else None]
    dist.broadcast(bits, group_src=source, group=group)
    dist.broadcast_object_list(report, group_src=source, group=group)
    updated = None
    if settings.changes_weights:
        empty = torch.empty(stored.shape, dtype=stored.dtype, device=layer.device)
        updated = solved.weight.contiguous() if solved else empty
        dist.broadcast(updated, group_src=source, group=group)
    return PrunedMatrix(unpack_mask(bits, in_features), updated, report[0])
