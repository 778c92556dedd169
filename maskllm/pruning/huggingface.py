"""One-shot pruning of a Hugging Face model in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from maskllm.errors import MaskLLMError
from maskllm.huggingface.blocks import as_matrix, check_no_fused_experts, linears_of, matrix, transformer_blocks
from maskllm.patterns import pack_mask
from maskllm.pruning.layerwise import Layer, prune_layers
from maskllm.pruning.solve import PrunedMatrix, PruneSettings, check_given, check_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PruneResult:
    """The result of `prune_hf`."""

    masks: dict[str, torch.Tensor]
    """Parameter name -> `patterns.pack_mask` bits of the mask [out, in], also for GPT-2, which stores parameters as [in, out]."""
    report: dict[str, Any]
    """JSON values: the settings, and the relative output error of each layer's matrices."""


@torch.no_grad()
def prune_hf(model: PreTrainedModel, input_ids: torch.Tensor, settings: PruneSettings | None = None) -> PruneResult:
    """Prune every linear of the decoder layers in place. The embedding and the output layer stay dense.

    Args:
        model: on any devices, but each layer on one device.
        input_ids: int64 [samples, sequence], the calibration tokens (`calibration.sample_windows`).
        settings: None for the defaults: 2:4, SparseGPT without weight update.

    Raises MaskLLMError if the model has no decoder layers or is a mixture of experts, a weight is not finite, the pattern or the mask
    file does not fit, or `input_ids` has another shape.
    """
    settings = settings or PruneSettings()
    _, layers = transformer_blocks(model)
    check_no_fused_experts(model)
    if input_ids.dim() != 2 or not input_ids.numel():
        raise MaskLLMError(f"calibration tokens have shape {list(input_ids.shape)}; wanted [samples, sequence], none of them 0")
    names = {module: name for name, module in model.named_modules()}
    linears = {name: linear for layer in layers for name, linear in linears_of(layer, names[layer]).items()}
    for name, linear in linears.items():
        check_matrix(matrix(linear), name, settings.sparsity)
    if (file := settings.mask_file) is not None:
        file.check({f"{name}.weight": tuple(linear.weight.shape) for name, linear in linears.items()})
        for name, linear in linears.items():
            mask = as_matrix(linear, file.mask(f"{name}.weight", tuple(linear.weight.shape)))
            check_given(mask, settings.sparsity, f"{file.path}: {name}.weight")
    was_training = model.training
    model.eval()
    try:
        # One pass of the whole model: layers may get different arguments (rotary embeddings, attention masks).
        calls = layer_calls(model, layers, input_ids[:1])
        hidden = [layer_calls(model, layers[:1], ids)[0].hidden.cpu() for ids in input_ids.split(1)]
        store = _Memory()
        prepared = (_prepared(layer, call, names[layer]) for layer, call in zip(layers, calls, strict=True))
        reports = prune_layers(prepared, len(layers), hidden, settings, store=store)
    finally:
        model.train(was_training)
    calibration = {"samples": input_ids.shape[0], "seq_length": input_ids.shape[1]}
    return PruneResult(store.masks, {**settings.as_dict(), "calibration": calibration, "layers": reports})


def _prepared(layer: torch.nn.Module, call: LayerCall, prefix: str) -> Layer:
    linears = linears_of(layer, prefix)
    return Layer(layer_forward(layer, call), linears, {name: matrix(linear) for name, linear in linears.items()})


class _Memory:
    """A `LayerStore` that keeps the masks in memory and resumes nothing."""

    def __init__(self) -> None:
        self.finished: frozenset[int] = frozenset()
        self.masks: dict[str, torch.Tensor] = {}

    def load(self, index: int) -> dict[str, PrunedMatrix]:
        raise KeyError(index)

    def save(self, index: int, pruned: dict[str, PrunedMatrix]) -> None:
        self.masks.update({f"{name}.weight": pack_mask(solved.mask).cpu() for name, solved in pruned.items()})


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer's forward pass."""

    hidden: torch.Tensor
    """[batch, sequence, hidden size]"""
    args: tuple[Any, ...]
    """The positional arguments after `hidden`."""
    kwargs: dict[str, Any]


def layer_forward(layer: torch.nn.Module, call: LayerCall) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer as a function of the hidden states. The other arguments are those of `call`.

    The layers of some models return a tuple.
    """

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    return forward


class _Reached(Exception):  # noqa: N818 - not an error
    """Stops a forward pass at the last layer of interest."""


def layer_calls(model: PreTrainedModel, layers: Sequence[torch.nn.Module], input_ids: torch.Tensor) -> list[LayerCall]:
    """The arguments of each of the model's first `layers` in a forward pass of `input_ids`, int64 [batch, sequence].

    The pass stops before the last of `layers` runs.
    """
    calls: list[LayerCall] = []

    def capture(_module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append(LayerCall(args[0], args[1:], kwargs))
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
