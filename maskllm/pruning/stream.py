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
from maskllm.huggingface.blocks import as_matrix, linears_of, transformer_blocks
from maskllm.huggingface.config import load_config
from maskllm.pruning.huggingface import LayerCall, layer_calls, layer_forward
from maskllm.pruning.layerwise import Layer


class LayerStream:
    """The decoder layers of `checkpoint`, which compute on `device` in `dtype`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._call: LayerCall | None = None
        self._layer: torch.nn.Module | None = None
        self._prefix = ""

    @torch.no_grad()
    def first_hidden(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """The first layer's input for each row of `input_ids`, int64 [samples, sequence]: [1, sequence, hidden size] on the host."""
        model = self._one_layer_model()
        self._prefix, (self._layer,) = transformer_blocks(model)
        hidden = []
        for ids in input_ids.split(1):
            (call,) = layer_calls(model, [self._layer], ids)
            hidden.append(call.hidden)
        # Rotary embeddings and the attention mask depend only on the positions, so they are the same for every layer.
        others = {"args": call.args, "kwargs": call.kwargs}
        others = _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), others)
        self._call = dataclasses.replace(call, **others)
        return hidden

    def __iter__(self) -> Iterator[Layer]:
        """Each layer in turn. Loading a layer frees the one before, with its stored weights. Call `first_hidden` first."""
        stored: dict[str, torch.Tensor] = {}
        for index in range(self._checkpoint.model_config.num_layers):
            self._layer.to("meta")  # frees the weights of the layer before
            stored.clear()
            prefix, state = f"{self._prefix}.{index}", {}
            linears = linears_of(self._layer, prefix)
            for name, tensor in self._tensors(f"{prefix}."):
                state[name] = tensor.to(self._device, self._dtype)
                if (linear := f"{prefix}.{name.removesuffix('.weight')}") in linears and name.endswith(".weight"):
                    stored[linear] = as_matrix(linears[linear], tensor)
            self._layer.load_state_dict(state, assign=True)
            del state, tensor
            yield Layer(layer_forward(self._layer, self._call), linears, stored)

    def _one_layer_model(self) -> PreTrainedModel:
        """The model on the host with the real embeddings and one layer with random weights."""
        config = load_config(self._checkpoint.hf_directory)
        config.num_hidden_layers = 1
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
