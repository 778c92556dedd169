"""Compare two files or directories of a pipeline's outputs bit for bit, except logs, times and memory.

Checkpoints are read with torch.distributed.checkpoint, so that no code of the project decides what is the same.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

FILES_NOT_COMPARED = re.compile(r".*\.distcp|\.metadata|manifest\.json|\.lock|rank_\d+\.log")
"""Names of files that may differ: those that hold a checkpoint's tensors, which are compared as tensors, their checksums, and logs."""
COSTS = re.compile(r".*(seconds|memory|_per_second).*")
"""Keys of JSON values that may differ: times and memory."""


def without_costs(value: Any) -> Any:
    """The JSON value `value` without times and memory."""
    if isinstance(value, dict):
        return {key: without_costs(one) for key, one in value.items() if not COSTS.fullmatch(key)}
    return [without_costs(one) for one in value] if isinstance(value, list) else value


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """All entries of a torch_dist checkpoint by key: tensors, and objects that Megatron stores with them."""
    reader = dcp.FileSystemReader(directory)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in reader.read_metadata().state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no process group, which no_dist says already
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    ".json": ("JSON values", lambda path: without_costs(json.loads(path.read_text()))),
    ".jsonl": ("lines", lambda path: [without_costs(json.loads(line)) for line in path.read_text().splitlines()]),
    ".npz": ("arrays", lambda path: dict(np.load(path))),
    ".pt": ("values of common.pt", lambda path: torch.load(path, weights_only=True)),
}
"""By suffix: what the entries are called, and how a file is read. Other files are compared byte for byte."""


def difference(first: Any, second: Any, name: str = "") -> str | None:
    """The first difference of two values, with its place; None if all bits are the same (NaN equals itself, 0 is not -0)."""
    if type(first) is not type(second):
        return f"{name}: {first!r:.80} and {second!r:.80}"
    if isinstance(first, list | tuple):
        first, second = dict(enumerate(first)), dict(enumerate(second))
    if isinstance(first, dict):
        for key in dict.fromkeys([*first, *second]):
            if key not in first or key not in second:
                return f"{name}[{key}]: only in the {'first' if key in first else 'second'}"
            if found := difference(first[key], second[key], f"{name}[{key}]"):
                return found
        return None
    if isinstance(first, io.BytesIO):
        first, second = first.getvalue(), second.getvalue()
    if isinstance(first, bytes):
        first, second = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    if isinstance(first, np.ndarray):
        first, second = torch.from_numpy(first.copy()), torch.from_numpy(second.copy())
    if isinstance(first, torch.Tensor):
        first, second = (value.detach().contiguous() for value in (first, second))
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return f"{name}: {first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        bits = [value.reshape(-1).view(torch.uint8).view(-1, value.element_size()) for value in (first, second)]
        places = (bits[0] != bits[1]).any(-1).nonzero().view(-1)
        if len(places) == 0:
            return None
        place, values = int(places[0]), [value.reshape(-1)[places[0]].item() for value in (first, second)]
        return f"{name}: {len(places)} of {first.numel()} entries, at {place} {values[0]!r} and {values[1]!r}"
    return None if repr(first) == repr(second) else f"{name}: {first!r:.80} and {second!r:.80}"


def compare(first: Path, second: Path, counts: Counter[str]) -> list[str]:
    """Compare two files or directories; returns a line for each file or checkpoint that differs, and counts what was compared."""
    if not (first.exists() and second.exists()):
        return [f"{first.name}: only {first if first.exists() else second} is there"]
    if first.is_dir() and second.is_dir():
        names = {path.name for folder in (first, second) for path in folder.iterdir()}
        found = [line for name in sorted(names) for line in compare(first / name, second / name, counts)]
        if (first / ".metadata").is_file() and (second / ".metadata").is_file():
            tensors = read_checkpoint(first)
            counts["checkpoints"] += 1
            counts["tensors"] += sum(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
            found += filter(None, [difference(tensors, read_checkpoint(second), str(first))])
        return found
    if FILES_NOT_COMPARED.fullmatch(first.name):
        return []
    kind, read = READERS.get(first.suffix, ("bytes", Path.read_bytes))
    one, other = read(first), read(second)
    counts["files"] += 1
    counts[kind] += len(one)
    return list(filter(None, [difference(one, other, str(first))]))
