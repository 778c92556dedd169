"""How a Megatron tensor is made of Hugging Face tensors: the kinds of mapping a family's parameter map is written in.

A family (`maskllm/models/llama.py`) lists mappings; `*` in a name stands for the layer's index. Shapes are written in the names of
`ModelConfig.dimensions`. The layouts are those of a whole tensor, tensor-parallel size 1: Megatron's torch_dist checkpoints hold
tensors by global coordinates, so that any layout loads them.

A mapping only moves rows. It therefore moves anything that has a weight's rows: the weight, its bias, its mask, its mask's bits.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from maskllm.models.config import ModelConfig

MASKED_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""The linears of a transformer layer that carry a mask: all of them (MaskLLM, section 4)."""


@dataclass(frozen=True)
class Mapping(ABC):
    """One Megatron tensor and the Hugging Face tensors whose rows it holds."""

    megatron: str
    """Its key in the checkpoint."""
    hf: tuple[str, ...]
    shape: tuple[str, ...]
    """The Megatron tensor's shape, in names of dimensions."""

    @abstractmethod
    def rows(self, config: ModelConfig) -> list[int]:
        """The number of rows of each of the Hugging Face tensors."""

    def to_megatron(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        """The Megatron tensor [rows, ...] of the Hugging Face tensors, in the order of `hf`."""
        return torch.cat(list(parts))

    def to_hf(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        """The Hugging Face tensors, in the order of `hf`, of a Megatron tensor [rows, ...]; views where possible."""
        return list(tensor.split(self.rows(config)))

    def megatron_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of the Megatron tensor."""
        dimensions = config.dimensions()
        return tuple(dimensions[name] for name in self.shape)

    def hf_shapes(self, config: ModelConfig) -> list[tuple[int, ...]]:
        """The shapes of the Hugging Face tensors."""
        return [(rows, *self.megatron_shape(config)[1:]) for rows in self.rows(config)]

    def at(self, layer: int) -> Mapping:
        """This mapping with `*` replaced by a layer's index."""
        return dataclasses.replace(
            self, megatron=self.megatron.replace("*", str(layer)), hf=tuple(name.replace("*", str(layer)) for name in self.hf)
        )

    @property
    def linear(self) -> str | None:
        """The name of the masked linear whose weight this is, for example decoder.layers.3.mlp.linear_fc1; None for others."""
        name = self.megatron.removesuffix(".weight")
        return name if name != self.megatron and name.endswith(MASKED_LINEARS) else None


@dataclass(frozen=True)
class Direct(Mapping):
    """The same tensor under another name."""

    def rows(self, config: ModelConfig) -> list[int]:
        return [self.megatron_shape(config)[0]]

    def to_megatron(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        return parts[0]


@dataclass(frozen=True)
class GatedMLP(Mapping):
    """fc1 of a gated MLP: all gate rows, then all up rows (`hf` is gate, up)."""

    def rows(self, config: ModelConfig) -> list[int]:
        return [config.ffn_hidden_size] * 2


@dataclass(frozen=True)
class QKV(Mapping):
    """The fused query-key-value projection (`hf` is q, k, v).

    Its rows go by query group: the group's query heads, its key head, its value head, as `SelfAttention.get_query_key_value_tensors`
    of Megatron Core splits them.
    """

    def rows(self, config: ModelConfig) -> list[int]:
        keys = config.num_query_groups * config.head_dim
        return [config.num_attention_heads * config.head_dim, keys, keys]

    def to_megatron(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        groups = [part.unflatten(0, (config.num_query_groups, -1)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def to_hf(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        groups = tensor.unflatten(0, (config.num_query_groups, -1))
        parts = groups.split([rows // config.num_query_groups for rows in self.rows(config)], dim=1)
        return [part.flatten(0, 1) for part in parts]


def expand(mappings: Iterable[Mapping], num_layers: int) -> list[Mapping]:
    """One mapping a layer for each mapping with a `*` in its name."""
    mappings = list(mappings)
    return [mapping.at(layer) for layer in range(num_layers) for mapping in mappings]
