"""Reading and writing the tensors of a Megatron `torch_dist` checkpoint one at a time, without a model and without ranks.

`torch_dist` is PyTorch's distributed checkpoint (DCP) plus Megatron's `metadata.json` and `common.pt`. Megatron's own `save` and
`load` need all tensors in memory at once. Conversion, trimming and export use DCP directly and hold one tensor at a time.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from tqdm import tqdm

from maskllm.errors import MaskLLMError, first_line


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known shape and dtype that is not in memory until `load` is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    """Reads or computes the tensor, on the CPU, with this shape and dtype."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorReader(Mapping[str, LazyTensor]):
    """The tensors in an iteration directory of a checkpoint, by key; each is read when its `load` is called."""

    def __init__(self, directory: Path, verify: Callable[[Iterable[str]], None]) -> None:
        """Read the directory's index. Before a tensor is read, `verify` is called with the names of the files that hold it.

        Raises MaskLLMError if the index is missing or cannot be read.
        """
        self.directory = directory
        self._verify = verify
        try:
            self._reader = _IndexedReader(directory)
        except FileNotFoundError as error:
            raise MaskLLMError(f"{directory}: not a torch_dist checkpoint, {Path(error.filename).name} is missing") from None
        except Exception as error:  # a damaged pickle raises nearly anything
            raise MaskLLMError(f"{directory / '.metadata'}: cannot be read ({type(error).__name__}: {error})") from None
        stored = self._reader.metadata.state_dict_metadata
        self._tensors = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self._files: dict[str, set[str]] = defaultdict(set)
        for index, place in self._reader.metadata.storage_data.items():
            self._files[index.fqn].add(place.relative_path)

    def __getitem__(self, key: str) -> LazyTensor:
        """The tensor `key`, not yet read. Raises MaskLLMError if it is missing; `load` raises it if a file is damaged."""
        if key not in self._tensors:
            raise MaskLLMError(f"{self.directory}: has no tensor {key}")
        entry = self._tensors[key]
        return LazyTensor(tuple(entry.size), entry.properties.dtype, lambda: self._load(key))

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _load(self, key: str) -> torch.Tensor:
        self._verify(sorted(self._files[key]))
        entry = self._tensors[key]
        values = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with _one_process():
                dcp.load(values, storage_reader=self._reader, planner=planner, no_dist=True)
        except Exception as error:  # a damaged file raises nearly anything
            reason = first_line(error)
            raise MaskLLMError(f"{self.directory}: tensor {key} cannot be read ({reason})") from None
        return values[key]


class _IndexedReader(dcp.FileSystemReader):
    """A reader that keeps the checkpoint's index instead of reading it again for each tensor."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _LazyPlanner(DefaultSavePlanner):
    """Plans with shapes only and loads each tensor when it is written."""

    def __init__(self, tensors: Mapping[str, LazyTensor], progress: tqdm) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._lazy = tensors
        self._progress = progress

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        lazy = self._lazy[index.fqn]
        tensor = lazy.load()
        if (tuple(tensor.shape), tensor.dtype) != (lazy.shape, lazy.dtype):
            raise RuntimeError(f"{index.fqn}: loaded {tensor.dtype} {list(tensor.shape)}, wanted {lazy.dtype} {list(lazy.shape)}")
        self._progress.update(lazy.nbytes)
        return tensor.contiguous()


def write_tensors(directory: Path, tensors: Mapping[str, LazyTensor], description: str) -> None:
    """Write `tensors`, in their order, as a `torch_dist` checkpoint into the existing `directory`, one in memory at a time.

    This is not atomic by itself. `description` labels the progress bar. An exception from a tensor's `load` is raised unchanged.
    Raises MaskLLMError if a file cannot be written, usually because the disk is full.
    """
    placeholders = {key: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta") for key, lazy in tensors.items()}
    total = sum(lazy.nbytes for lazy in tensors.values())
    # The writer keeps a file's tensors in memory until the file is closed, so each tensor gets its own file. Copying ahead would
    # also keep several tensors in memory.
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=False, per_thread_copy_ahead=0)
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=None) as progress:
        try:
            with _one_process():
                dcp.save(placeholders, storage_writer=writer, planner=_LazyPlanner(tensors, progress), no_dist=True)
        except RuntimeError as error:
            if not is_short_write(error):
                raise
            raise MaskLLMError(
                f"{directory}: cannot be written, the disk is probably full ({first_line(error, with_type=False)})"
            ) from None
    torch.save({}, directory / "common.pt")
    save_config(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1), str(directory))


def is_short_write(error: BaseException) -> bool:
    """Whether `error` is torch.save's error for a file that was cut short, as on a full disk."""
    return "inline_container" in str(error)


@contextmanager
def _one_process() -> Iterator[None]:
    """A block that uses DCP from a single process, without DCP's warning about that. Raises the cause of a CheckpointException."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except dcp.api.CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from None
