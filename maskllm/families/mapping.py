"""How a Megatron tensor is made of Hugging Face tensors: the kinds of mapping that a family's parameter map consists of.

A family (`maskllm/families/llama.py`) lists mappings. `*` in a name stands for the layer's index. Shapes are given in the names of
`ModelConfig.dimensions`. A mapping describes the whole tensor, that is tensor-parallel size 1: Megatron's torch_dist checkpoints
store tensors by global coordinates, so any layout loads them.

`fuse` and `split` only move rows. They therefore work for everything that has the rows of a weight: the weight, its bias, its mask
and its packed mask. `to_megatron` and `to_hf` also transpose the tensors of families that store weights as [in, out].
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from maskllm.families.linears import linear_of
from maskllm.families.model_config import ModelConfig


@dataclass(frozen=True)
class Mapping(ABC):
    """One Megatron tensor and the Hugging Face tensors that its rows come from."""

    megatron: str
    """Its key in the checkpoint."""
    hf: tuple[str, ...]
    """The names of the Hugging Face tensors."""
    shape: tuple[str, ...]
    """The shape of the Megatron tensor, in names of `ModelConfig.dimensions`."""
    transposed: bool = False
    """Whether the Hugging Face tensors are stored [in, out], as transformers' `Conv1D` stores them; Megatron's are [out, in]."""

    @abstractmethod
    def rows(self, config: ModelConfig) -> list[int]:
        """The number of rows (outputs) of each of the Hugging Face tensors."""

    def fuse(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        """Combine `parts`, each with the rows of one of `hf` and in that order, to a tensor with the Megatron tensor's rows."""
        return torch.cat(list(parts))

    def split(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        """Undo `fuse`: split a tensor with the Megatron tensor's rows into parts, in the order of `hf`; views if possible."""
        return list(tensor.split(self.rows(config)))

    def transpose(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Turn matrices [out, in] into what the Hugging Face checkpoint stores, or the other way round; views."""
        return [part.t() for part in parts] if self.transposed else list(parts)

    def to_megatron(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        """The Megatron tensor that is made of the Hugging Face tensors `parts`, given as they are stored, in the order of `hf`."""
        return self.fuse(self.transpose(parts), config)

    def to_hf(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        """Undo `to_megatron`: the Hugging Face tensors as they are stored, in the order of `hf`; views if possible."""
        return self.transpose(self.split(tensor, config))

    def megatron_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape of the Megatron tensor."""
        dimensions = config.dimensions()
        return tuple(dimensions[name] for name in self.shape)

    def hf_shapes(self, config: ModelConfig) -> list[tuple[int, ...]]:
        """The shapes of the Hugging Face tensors, as they are stored."""
        shapes = [(rows, *self.megatron_shape(config)[1:]) for rows in self.rows(config)]
        return [shape[::-1] for shape in shapes] if self.transposed else shapes

    def at(self, layer: int) -> Mapping:
        """This mapping with `*` replaced by a layer's index."""
        return dataclasses.replace(
            self, megatron=self.megatron.replace("*", str(layer)), hf=tuple(name.replace("*", str(layer)) for name in self.hf)
        )

    @property
    def linear(self) -> str | None:
        """The masked linear that has this tensor as its weight, such as decoder.layers.3.mlp.linear_fc1; None for other tensors."""
        is_weight = self.megatron.endswith(".weight") and linear_of(self.megatron) is not None
        return self.megatron.removesuffix(".weight") if is_weight else None


@dataclass(frozen=True)
class Direct(Mapping):
    """The same tensor under another name."""

    def rows(self, config: ModelConfig) -> list[int]:
        return [self.megatron_shape(config)[0]]

    def fuse(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        return parts[0]


@dataclass(frozen=True)
class Vocabulary(Direct):
    """A matrix with a row for each token. Megatron's has `ModelConfig.vocab_padding` rows of zeros after them."""

    def rows(self, config: ModelConfig) -> list[int]:
        return [config.vocab_size]

    def fuse(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        (tokens,) = parts
        return torch.cat([tokens, tokens.new_zeros(config.vocab_padding, *tokens.shape[1:])]) if config.vocab_padding else tokens

    def split(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        return [tensor[: config.vocab_size]]


@dataclass(frozen=True)
class GatedMLP(Mapping):
    """fc1 of a gated MLP: all gate rows, then all up rows (`hf` is gate, up)."""

    def rows(self, config: ModelConfig) -> list[int]:
        return [config.ffn_hidden_size] * 2


@dataclass(frozen=True)
class QKVByGroup(Mapping):
    """The fused query-key-value projection (`hf` is q, k, v).

    Its rows are ordered by query group: the group's query heads, its key head, its value head, as
    `SelfAttention.get_query_key_value_tensors` of Megatron Core splits them.
    """

    def rows(self, config: ModelConfig) -> list[int]:
        return _query_key_value_rows(config)

    def fuse(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        groups = [part.unflatten(0, (config.num_query_groups, -1)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def split(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        groups = tensor.unflatten(0, (config.num_query_groups, -1))
        parts = groups.split([rows // config.num_query_groups for rows in _query_key_value_rows(config)], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class StackedQKV(QKVByGroup):
    """The same for one Hugging Face tensor that holds all query rows, then all key rows, then all value rows."""

    def rows(self, config: ModelConfig) -> list[int]:
        return [sum(_query_key_value_rows(config))]

    def fuse(self, parts: Sequence[torch.Tensor], config: ModelConfig) -> torch.Tensor:
        (stacked,) = parts
        return super().fuse(stacked.split(_query_key_value_rows(config)), config)

    def split(self, tensor: torch.Tensor, config: ModelConfig) -> list[torch.Tensor]:
        return [torch.cat(super().split(tensor, config))]


def _query_key_value_rows(config: ModelConfig) -> list[int]:
    """The number of rows of the query, key and value projections."""
    keys = config.num_query_groups * config.head_dim
    return [config.num_attention_heads * config.head_dim, keys, keys]


def expand(mappings: Iterable[Mapping], num_layers: int) -> list[Mapping]:
    """Each of `mappings`, which have a `*` in their names, once for every layer. Layer 0 comes first."""
    mappings = list(mappings)
    return [mapping.at(layer) for layer in range(num_layers) for mapping in mappings]
