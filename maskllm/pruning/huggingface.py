"""One-shot pruning of a transformers model in memory: any architecture, any inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from maskllm.errors import MaskLLMError
from maskllm.huggingface.blocks import as_matrix, block_linears, check_no_fused_experts, matrix
from maskllm.masking.selection import check_keeps
from maskllm.patterns import pack_mask, unpack_mask
from maskllm.pruning.calls import Calls, find_chains
from maskllm.pruning.layerwise import Layer, prune_layers
from maskllm.pruning.solve import PrunedMatrix, PruneSettings, check_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = torch.Tensor | Iterable[Mapping[str, Any]]
"""Calibration samples: tokens, or the model's inputs for each sample."""


@dataclass(frozen=True)
class PruneResult:
    """The result of `prune_hf`."""

    masks: dict[str, torch.Tensor]
    """Parameter name -> `patterns.pack_mask` bits of the mask [out, in], also for GPT-2, which stores parameters as [in, out]."""
    report: dict[str, Any]
    """JSON values: the settings, and the relative output error of each layer's matrices."""

    def unpacked(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The masks, bool by parameter name in the parameter's shape, as `maskllm.huggingface.sparsify` takes them."""
        found = {}
        for name, bits in self.masks.items():
            linear = model.get_submodule(name.removesuffix(".weight"))
            found[name] = as_matrix(linear, unpack_mask(bits, matrix(linear).shape[1]))
        return found


@torch.no_grad()
def prune_hf(model: PreTrainedModel, inputs: Inputs, settings: PruneSettings | None = None) -> PruneResult:
    """Prune every linear of the model's stacks of blocks in place, those of encoders and decoders. All else stays dense, and so do
    linears that share their weight with another module.

    Args:
        model: on any devices, but each block on one device.
        inputs: int64 [samples, sequence], the calibration tokens (`calibration.sample_windows`); or the samples as the model's keyword
            arguments, such as {"input_ids": ..., "labels": ...}. A sample may be a batch, but its padding would count as tokens.
        settings: None for the defaults: 2:4, SparseGPT without weight update.

    Raises MaskLLMError if the model has no stack of blocks or is a mixture of experts, a weight is not finite, the pattern or the mask
    file does not fit, or there are no inputs or tokens of another shape.
    """
    settings = settings or PruneSettings()
    check_no_fused_experts(model)
    samples, calibration = _samples(inputs)
    linears = block_linears(model)
    for name, linear in linears.items():
        check_matrix(matrix(linear), name, settings.sparsity)
    if (file := settings.mask_file) is not None:
        file.check({f"{name}.weight": tuple(linear.weight.shape) for name, linear in linears.items()})
        for name, linear in linears.items():
            mask = as_matrix(linear, file.mask(f"{name}.weight", tuple(linear.weight.shape)))
            check_keeps(mask, settings.sparsity, f"{file.path}: {name}.weight")
    was_training = model.training
    model.eval()
    store, reports = _Memory(), []
    try:
        chains = find_chains(model, linears, samples[0])
        # With `sequential`, the inputs of a chain are those that the pruned chains before it lead to.
        recorded = (chain.record(model, samples) for chain in chains)
        for chain, calls in zip(chains, recorded if settings.sequential else list(recorded), strict=True):
            layers = (_layer(block, calls, position, linears, name) for position, (name, block) in enumerate(chain.blocks.items()))
            found = prune_layers(layers, len(chain.blocks), calls.hidden, settings, store=store)
            reports += [{**report, "layer": len(reports) + report["layer"]} for report in found]
    finally:
        model.train(was_training)
    return PruneResult(store.masks, {**settings.as_dict(), "calibration": calibration, "layers": reports})


def _samples(inputs: Inputs) -> tuple[list[Mapping[str, Any]], dict[str, int]]:
    """The samples as keyword arguments, and what the report says of them. Raises MaskLLMError if there are none."""
    if isinstance(inputs, torch.Tensor):
        if inputs.dim() != 2 or not inputs.numel():
            raise MaskLLMError(f"calibration tokens have shape {list(inputs.shape)}; wanted [samples, sequence], none of them 0")
        return [{"input_ids": ids} for ids in inputs.split(1)], {"samples": inputs.shape[0], "seq_length": inputs.shape[1]}
    samples = list(inputs)
    if not samples:
        raise MaskLLMError("calibration: no samples; wanted at least one, the model's inputs by name")
    return samples, {"samples": len(samples)}


def _layer(block: torch.nn.Module, calls: Calls, position: int, linears: Mapping[str, torch.nn.Module], prefix: str) -> Layer:
    own = {name: linear for name, linear in linears.items() if name.startswith(f"{prefix}.")}
    return Layer(calls.forward(position, block), own, {name: matrix(linear) for name, linear in own.items()})


class _Memory:
    """A `LayerStore` that keeps the masks in memory and resumes nothing."""

    def __init__(self) -> None:
        self.finished: frozenset[int] = frozenset()
        self.masks: dict[str, torch.Tensor] = {}

    def load(self, index: int) -> dict[str, PrunedMatrix]:
        raise KeyError(index)

    def save(self, index: int, pruned: dict[str, PrunedMatrix]) -> None:
        self.masks.update({f"{name}.weight": pack_mask(solved.mask).cpu() for name, solved in pruned.items()})
