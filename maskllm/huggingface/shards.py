"""Writing safetensors of any size with one tensor in memory: the headers come first, then each tensor goes to its place."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from maskllm.dtypes import BY_SAFETENSORS
from maskllm.errors import MaskLLMError
from maskllm.files import write_json
from maskllm.huggingface.tensors import INDEX
from maskllm.huggingface.weights_hash import WeightsHash

MAX_SHARD_SIZE = "5GB"
"""The largest safetensors file to write: the default of huggingface_hub's writer."""

STORED_NAMES = {dtype: name for name, dtype in BY_SAFETENSORS.items()} | {torch.int8: "I8", torch.uint8: "U8", torch.int64: "I64"}
"""How safetensors names the dtypes of weights and of what a compressed weight is stored as."""

_ORDER = (
    "U64",
    "I64",
    "F64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E8M0",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)
"""The dtypes that are written, in the order of their tensors in a file: safetensors' own, with the widest first.

It keeps each tensor aligned, and a file has the same bytes as `safetensors.torch.save_file` gives it.
"""

_BYTES = {name: int("".join(filter(str.isdigit, name.split("_")[0])) or 8) // 8 for name in _ORDER}


@dataclass(frozen=True)
class TensorSpec:
    """The dtype, as safetensors names it ("BF16"), and the shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes. Raises MaskLLMError if the dtype is none that is written."""
        if self.dtype not in _BYTES:
            raise MaskLLMError(f"a tensor of type {self.dtype}; wanted one of {', '.join(_BYTES)}")
        return math.prod(self.shape) * _BYTES[self.dtype]


class ShardWriter:
    """The weights of a Hugging Face directory while they are written. `write_shards` makes it."""

    def __init__(self, directory: Path, tensors: Mapping[str, TensorSpec], max_shard_size: str) -> None:
        shards = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self.total_bytes: int = shards.metadata["total_size"]
        self.weights_hash = WeightsHash()
        """Of the tensors that are written."""
        self._left = dict(tensors)
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        for file, names in shards.filename_to_tensors.items():
            descriptor = os.open(directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._descriptors.append(descriptor)
            header, offsets = _header({name: tensors[name] for name in names})
            _write(descriptor, header, 0)
            self._places |= {name: (descriptor, len(header) + offset) for name, offset in offsets.items()}
        if shards.is_sharded:
            write_json(directory / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": shards.tensor_to_filename})

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, which has the shape and size in bytes that were announced."""
        spec = self._left.pop(name)
        tensor = tensor.detach().cpu()
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        if tuple(tensor.shape) != spec.shape or data.numel() != spec.nbytes:
            raise AssertionError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not the announced {spec}")
        descriptor, offset = self._places[name]
        self.weights_hash.add(name, tensor)
        _write(descriptor, memoryview(data.numpy()), offset)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)


@contextlib.contextmanager
def write_shards(directory: Path, tensors: Mapping[str, TensorSpec], max_shard_size: str = MAX_SHARD_SIZE) -> Iterator[ShardWriter]:
    """A block that writes model.safetensors, or shards and their index, into `directory`.

    `tensors` says what will be written. The block writes each of them once, in any order.
    """
    writer = ShardWriter(directory, tensors, max_shard_size)
    try:
        yield writer
    finally:
        writer.close()
    if writer._left:
        raise AssertionError(f"not written: {sorted(writer._left)}")


def _header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The bytes of a file before its data, and where each tensor begins in the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name, spec in sorted(tensors.items(), key=lambda item: (_ORDER.index(item[1].dtype), item[0])):
        offsets[name], end = end, end + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def _write(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at an offset of a file: one call of the system may write less."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
