"""A Megatron checkpoint as a stream of Hugging Face decoder layers, one of which is in memory at a time.

Pruning does not build the Megatron model: a layer at a time, whole, on every rank, needs less memory than any split of the model, and
gives every layout the same arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.utils import _pytree
from transformers import AutoConfig, AutoModel, PreTrainedModel

from maskllm.checkpoints.reading import Checkpoint
from maskllm.families.registry import parameter_map
from maskllm.huggingface.blocks import linears_of, transformer_blocks
from maskllm.pruning.huggingface import LayerCall, layer_calls, layer_forward
from maskllm.pruning.layerwise import Layer


class LayerStream:
    """The decoder layers of `checkpoint`, computing on `device` in `dtype`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        self._call: LayerCall | None = None
        self._layer: torch.nn.Module | None = None
        self._prefix = ""

    @torch.no_grad()
    def first_hidden(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """The hidden states [1, sequence, hidden size] that the first layer reads, on the host, for each row of `input_ids`."""
        model = self._one_layer_model()
        self._prefix, (self._layer,) = transformer_blocks(model)
        hidden = []
        for ids in input_ids.split(1):
            (call,) = layer_calls(model, [self._layer], ids)
            hidden.append(call.hidden)
        # Rotary embeddings and the attention mask depend on the positions alone, and are the same for every layer.
        others = {"args": call.args, "kwargs": call.kwargs}
        others = _pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self._device), others)
        self._call = dataclasses.replace(call, **others)
        return hidden

    def __iter__(self) -> Iterator[Layer]:
        """Each layer in turn; the one before is gone. To be called after `first_hidden`."""
        for index in range(self._checkpoint.model_config.num_layers):
            self._layer.to("meta")  # lets go of the weights of the layer before
            prefix, state, stored = f"{self._prefix}.{index}", {}, None
            for name, tensor in self._tensors(f"{prefix}."):
                stored = tensor.dtype
                state[name] = tensor.to(self._device, self._dtype)
            self._layer.load_state_dict(state, assign=True)
            del state, tensor
            yield Layer(layer_forward(self._layer, self._call), linears_of(self._layer, prefix), stored)

    def _one_layer_model(self) -> PreTrainedModel:
        """The model on the host with its real embeddings and one layer, whose weights are still random."""
        config = AutoConfig.from_pretrained(self._checkpoint.hf_directory)
        config.num_hidden_layers = 1
        config.vocab_size, config.pad_token_id = 1, None  # the real embedding follows; this one would only be drawn in vain
        model = AutoModel.from_config(config).eval()
        for mapping in parameter_map(self._checkpoint.model_config):
            if mapping.megatron.startswith("embedding."):
                (name,) = mapping.hf
                embedding = model.get_submodule(name.removeprefix(f"{model.base_model_prefix}.").removesuffix(".weight"))
                tensor = self._checkpoint.tensors[mapping.megatron].load().to(self._dtype)
                embedding.weight = torch.nn.Parameter(tensor, requires_grad=False)
        return model

    def _tensors(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's tensors whose Hugging Face name starts with `prefix`, under the rest of that name."""
        for mapping in parameter_map(self._checkpoint.model_config):
            if mapping.hf[0].startswith(prefix):
                parts = mapping.to_hf(self._checkpoint.tensors[mapping.megatron].load(), self._checkpoint.model_config)
                for name, part in zip(mapping.hf, parts, strict=True):
                    yield name.removeprefix(prefix), part
