"""Prune a Hugging Face model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from maskllm.errors import MaskLLMError
from maskllm.patterns import pack_mask
from maskllm.pruning.layerwise import Layer, prune_layers
from maskllm.pruning.solve import PrunedMatrix, PruneSettings, check_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PruneResult:
    """The masks, parameter name -> `patterns.pack_mask` bits, and a report of JSON values."""

    masks: dict[str, torch.Tensor]
    report: dict[str, Any]


@torch.no_grad()
def prune_hf(model: PreTrainedModel, input_ids: torch.Tensor, settings: PruneSettings | None = None) -> PruneResult:
    """Prune every linear of a LLaMA-like decoder's layers in place; embedding and output layer stay dense.

    Args:
        model: on any device, each layer on one.
        input_ids: int64 [samples, sequence], the calibration tokens (`calibration.sample_windows`).
        settings: None for the defaults, 2:4 by SparseGPT without weight update.

    Raises MaskLLMError for a model without decoder layers, a weight that is not finite, and a pattern that does not fit.
    """
    settings = settings or PruneSettings()
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList) or not len(layers):
        raise MaskLLMError(f"{type(model).__name__} has no list of decoder layers at {model.base_model_prefix}.layers")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise MaskLLMError(f"calibration tokens have shape {list(input_ids.shape)}; wanted [samples, sequence], none of them 0")
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        for linear in _linears(layer).values():
            check_matrix(linear.weight, names[linear], settings.sparsity)
    was_training = model.training
    model.eval()
    try:
        arguments = _layer_arguments(model, layers, input_ids[:1])
        hidden = [_first_hidden(model, layers[0], ids) for ids in input_ids.split(1)]
        store = _Memory()
        prepared = (
            _prepare(layer, kwargs, {names[linear]: linear for linear in _linears(layer).values()})
            for layer, kwargs in zip(layers, arguments, strict=True)
        )
        reports = prune_layers(prepared, len(layers), hidden, settings, store=store)
    finally:
        model.train(was_training)
    calibration = {"samples": input_ids.shape[0], "seq_length": input_ids.shape[1]}
    return PruneResult(store.masks, {**settings.as_dict(), "calibration": calibration, "layers": reports})


class _Memory:
    """Keeps the masks; there is nothing to resume."""

    def __init__(self) -> None:
        self.masks: dict[str, torch.Tensor] = {}

    def load(self, index: int) -> None:
        return None

    def save(self, index: int, pruned: dict[str, PrunedMatrix]) -> None:
        self.masks.update({f"{name}.weight": pack_mask(matrix.mask) for name, matrix in pruned.items()})


def _linears(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}


def _prepare(layer: torch.nn.Module, kwargs: dict[str, Any], linears: dict[str, torch.nn.Module]) -> Layer:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    return Layer(forward, linears)


def _layer_arguments(model: PreTrainedModel, layers: torch.nn.ModuleList, input_ids: torch.Tensor) -> list[dict[str, Any]]:
    """What the model passes to each layer besides the hidden states (masks, rotary embeddings): the same for every sample."""
    arguments: list[dict[str, Any]] = []

    def capture(_module: torch.nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        arguments.append(kwargs)

    handles = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers]
    try:
        model.base_model(input_ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return arguments


class _Reached(Exception):  # noqa: N818 - not an error
    """The forward pass has come to the first layer."""


def _first_hidden(model: PreTrainedModel, first: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """One sample's hidden states [1, sequence, hidden size] as the first layer reads them, on the host."""
    captured: list[torch.Tensor] = []

    def capture(_module: torch.nn.Module, args: tuple) -> None:
        captured.append(args[0].cpu())
        raise _Reached

    handle = first.register_forward_pre_hook(capture)
    try:
        model.base_model(input_ids.to(model.device), use_cache=False)
    except _Reached:
        return captured[0]
    finally:
        handle.remove()
    raise MaskLLMError(f"{type(model).__name__} did not call its first decoder layer")
