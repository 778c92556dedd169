"""A Megatron checkpoint as a stream of Hugging Face decoder layers. One layer is in memory at a time.

Pruning does not build the Megatron model. Each rank holds one whole layer at a time. That needs less memory than any split of the
model, and the arithmetic is the same for every layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.utils import _pytree
from transformers import AutoModel, PreTrainedModel

from maskllm.checkpoints.reading import Checkpoint
from maskllm.families.registry import parameter_map
from maskllm.huggingface.blocks import as_matrix, block_stacks, linears_of
from maskllm.huggingface.config import load_config
from maskllm.pruning.calls import BlockCall, block_calls
from maskllm.pruning.layerwise import Layer


class LayerStream:
    """The decoder layers of `checkpoint`, which compute on `device` in `dtype`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        config = checkpoint.model_config
        self._windowed = config.windowed_layers or (False,) * config.num_layers
        self._kinds: dict[bool, tuple[torch.nn.Module, BlockCall]] = {}
        """A layer with a window, and one without: the module, which all layers of its kind pass through, and its other arguments."""
        self._prefix = ""

    @torch.no_grad()
    def first_hidden(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """The first layer's input for each row of `input_ids`, int64 [samples, sequence]: [1, sequence, hidden size] on the host."""
        hidden: list[torch.Tensor] = []
        for windowed in dict.fromkeys(self._windowed):
            model = self._one_layer_model(self._windowed.index(windowed))
            ((stack, (layer,)),) = block_stacks(model).items()
            self._prefix = f"{model.base_model_prefix}.{stack}"
            # Rotary embeddings and the attention mask depend only on the positions, so they are the same for all layers of a kind.
            call = _first_call(model, layer, input_ids[:1])
            others = {"args": call.args, "kwargs": call.kwargs}
            others = _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), others)
            self._kinds[windowed] = layer, dataclasses.replace(call, **others)
            hidden = hidden or [_first_call(model, layer, ids).hidden for ids in input_ids.split(1)]
        return hidden

    def __iter__(self) -> Iterator[Layer]:
        """Each layer in turn. Loading a layer frees the one before, with its stored weights. Call `first_hidden` first."""
        stored: dict[str, torch.Tensor] = {}
        for index, windowed in enumerate(self._windowed):
            for layer, _ in self._kinds.values():
                layer.to("meta")  # frees the weights of the layer before
            stored.clear()
            layer, call = self._kinds[windowed]
            prefix, state = f"{self._prefix}.{index}", {}
            linears = linears_of(layer, prefix)
            for name, tensor in self._tensors(f"{prefix}."):
                state[name] = tensor.to(self._device, self._dtype)
                if (linear := f"{prefix}.{name.removesuffix('.weight')}") in linears and name.endswith(".weight"):
                    stored[linear] = as_matrix(linears[linear], tensor)
            layer.load_state_dict(state, assign=True)
            del state, tensor
            yield Layer(lambda _, hidden, layer=layer, call=call: call.output(layer, hidden), linears, stored)

    def _one_layer_model(self, index: int) -> PreTrainedModel:
        """The model on the host with the real embeddings and one layer of the kind of layer `index`, with random weights."""
        config = load_config(self._checkpoint.hf_directory)
        config.num_hidden_layers = 1
        if hasattr(config, "layer_types"):
            config.layer_types = [config.layer_types[index]]
        config.vocab_size, config.pad_token_id = 1, None  # a small random embedding; the real one replaces it below
        model = AutoModel.from_config(config).eval()
        model_config = self._checkpoint.model_config
        for mapping in parameter_map(model_config):
            if mapping.megatron.startswith("embedding."):
                (name,), (tensor,) = mapping.hf, mapping.to_hf(self._checkpoint.tensors[mapping.megatron].load(), model_config)
                embedding = model.get_submodule(name.removeprefix(f"{model.base_model_prefix}.").removesuffix(".weight"))
                embedding.weight = torch.nn.Parameter(tensor.to(self._dtype), requires_grad=False)
        return model

    def _tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors with Hugging Face names that start with `prefix`: (the rest of the name, tensor)."""
        for mapping in parameter_map(self._checkpoint.model_config):
            if mapping.hf[0].startswith(prefix):
                parts = mapping.to_hf(self._checkpoint.tensors[mapping.megatron].load(), self._checkpoint.model_config)
                for name, part in zip(mapping.hf, parts, strict=True):
                    yield name.removeprefix(prefix), part


def _first_call(model: PreTrainedModel, layer: torch.nn.Module, ids: torch.Tensor) -> BlockCall:
    """How a forward pass of `ids`, int64 [1, sequence], calls the layer."""
    ((_, call),) = block_calls(model, {"layer": layer}, {"input_ids": ids}, most=1)
    return call
