"""Prune a Hugging Face model in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
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
    """What `prune_hf` found."""

    masks: dict[str, torch.Tensor]
    """Parameter name -> `patterns.pack_mask` bits."""
    report: dict[str, Any]
    """JSON values: the settings and, by layer and matrix, the relative output error."""


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
        for name, linear in linears_of(layer, names[layer]).items():
            check_matrix(linear.weight, name, settings.sparsity)
    was_training = model.training
    model.eval()
    try:
        # The whole model, once: each layer may get other arguments (rotary embeddings, attention masks).
        arguments = layer_inputs(model, layers, input_ids[:1])
        hidden = [layer_inputs(model, layers[:1], ids)[0][0].cpu() for ids in input_ids.split(1)]
        store = _Memory()
        prepared = (
            Layer(layer_forward(layer, kwargs), linears_of(layer, names[layer]))
            for layer, (_, kwargs) in zip(layers, arguments, strict=True)
        )
        reports = prune_layers(prepared, len(layers), hidden, settings, store=store)
    finally:
        model.train(was_training)
    calibration = {"samples": input_ids.shape[0], "seq_length": input_ids.shape[1]}
    return PruneResult(store.masks, {**settings.as_dict(), "calibration": calibration, "layers": reports})


class _Memory:
    """Keeps the masks; there is nothing to resume."""

    def __init__(self) -> None:
        self.finished: frozenset[int] = frozenset()
        self.masks: dict[str, torch.Tensor] = {}

    def load(self, index: int) -> dict[str, PrunedMatrix]:
        raise KeyError(index)

    def save(self, index: int, pruned: dict[str, PrunedMatrix]) -> None:
        self.masks.update({f"{name}.weight": pack_mask(matrix.mask).cpu() for name, matrix in pruned.items()})


def linears_of(layer: torch.nn.Module, prefix: str) -> dict[str, torch.nn.Module]:
    """The linears of a decoder layer by name, `prefix` before it."""
    return {f"{prefix}.{name}": module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}


def layer_forward(layer: torch.nn.Module, kwargs: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer as a function of the hidden states alone. Before version 5, transformers' layers return a tuple."""

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    return forward


class _Reached(Exception):  # noqa: N818 - not an error
    """The forward pass has come to the last layer asked for."""


def layer_inputs(
    model: PreTrainedModel, layers: Sequence[torch.nn.Module], input_ids: torch.Tensor
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """What each of the model's first `layers` is called with: the hidden states [batch, sequence, hidden size] and all else.

    `input_ids` are int64 [batch, sequence]. The forward pass stops before the last of `layers` runs.
    """
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def capture(_module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args[0], kwargs))
        if len(calls) == len(layers):
            raise _Reached

    handles = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers]
    try:
        with contextlib.suppress(_Reached):
            model.base_model(input_ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls
