"""The checkpoint directory: where each iteration lies, what it is, and how it gets there whole.

CKPT/latest_checkpointed_iteration.txt    "release" or a number, as Megatron-LM writes it
CKPT/release/, CKPT/iter_0000010/         one iteration each:
    *.distcp, .metadata, metadata.json, common.pt      Megatron Core's torch_dist format
    hf/                                   config.json, generation_config.json and tokenizer files of the original
    maskllm.json                          what the tensors are: stage, pattern, origin (`CheckpointInfo`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from maskllm.errors import MaskLLMError
from maskllm.files import atomic_directory, publish_directory, write_json, write_text
from maskllm.models.config import ModelConfig
from maskllm.models.families import parameter_map, read_model_config
from maskllm.models.hf_config import read_json_object
from maskllm.models.hf_source import copy_side_files
from maskllm.models.torch_dist import LazyTensor, TensorReader, write_tensors
from maskllm.patterns import Pattern

FORMAT_VERSION = 1
LATEST = "latest_checkpointed_iteration.txt"
INFO = "maskllm.json"
UNSTRUCTURED = "unstructured"
"""The pattern of one-shot masks that follow none."""
STAGES = ("dense", "pruned", "trained", "trimmed")

Iteration = int | Literal["release"]
"""A training step, or "release" for a checkpoint that does not come from training (as Megatron-LM calls it)."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint's tensors are."""

    stage: str
    """dense: weights as converted; pruned: also `mask_bits`; trained: also `mask_logits`; trimmed: zeros written into the weights."""
    source: str
    """The Hugging Face directory or hub id that was converted."""
    pattern: str | None = None
    """N:M or UNSTRUCTURED; None for a dense checkpoint."""
    method: str | None = None
    """How the one-shot mask in `mask_bits` was made; None where there is none."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further facts of the verb that wrote it, for people and reports."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise MaskLLMError(f"checkpoint stage {self.stage!r}; wanted one of {', '.join(STAGES)}")
        if (self.pattern is None) != (self.stage == "dense"):
            raise MaskLLMError(f"checkpoint stage {self.stage} with pattern {self.pattern}; wanted a pattern for all but dense")

    @property
    def block_pattern(self) -> Pattern | None:
        """The N:M pattern; None where masks follow none, or there are no masks. Raises MaskLLMError where it is malformed."""
        return None if self.pattern in (None, UNSTRUCTURED) else Pattern.parse(self.pattern)


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a checkpoint directory, opened for reading."""

    path: Path
    """The iteration directory."""
    iteration: Iteration
    info: CheckpointInfo

    @property
    def hf_directory(self) -> Path:
        """The original's config and tokenizer files."""
        return self.path / "hf"

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """The architecture. Raises MaskLLMError where it is missing or not supported."""
        return read_model_config(self.hf_directory / "config.json")

    @functools.cached_property
    def tensors(self) -> TensorReader:
        """Its tensors by key, each read when asked for. Raises MaskLLMError where the index cannot be read."""
        return TensorReader(self.path)

    def check_weights(self) -> None:
        """Raise MaskLLMError naming the first weight that is missing or whose shape is not what the config says."""
        for mapping in parameter_map(self.model_config):
            self.check_shape(mapping.megatron, mapping.megatron_shape(self.model_config))

    def check_shape(self, key: str, wanted: tuple[int, ...]) -> None:
        """Raise MaskLLMError where the tensor `key` is missing or has another shape than `wanted`."""
        found = self.tensors[key].shape
        if found != wanted:
            raise MaskLLMError(f"{self.path}: tensor {key} has shape {list(found)}; the model's config asks for {list(wanted)}")

    def load(self, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Megatron's `dist_checkpointing.load`, on every rank, of a sharded state dict made under any parallel layout.

        Returns the state dict with tensors in place of `ShardedTensor`s. Raises MaskLLMError naming the first tensor that the
        checkpoint lacks or holds with another global shape, and where a file of it is missing or damaged.
        """
        for name in ("common.pt", "metadata.json"):
            if not (self.path / name).is_file():
                raise MaskLLMError(f"{self.path / name}: no such file; the checkpoint is incomplete, make it again")
        sharded_state_dict = _without_extra_state(sharded_state_dict)
        for tensor in _sharded_tensors(sharded_state_dict):
            self.check_shape(tensor.key, tuple(tensor.global_shape))
        with _one_line(f"{self.path}: cannot be loaded"):
            return dist_checkpointing.load(sharded_state_dict, str(self.path))


def resolve(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a directory with `latest_checkpointed_iteration.txt` (its latest iteration), or an iteration directory.

    Raises MaskLLMError where `path` is neither, or was written by a newer version of this program.
    """
    path = Path(path)
    if not path.is_dir():
        raise MaskLLMError(f"{path}: no such directory; wanted a checkpoint that `maskllm convert` or training wrote")
    if (path / LATEST).is_file():
        text = (path / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not re.fullmatch(r"\d{1,18}", text):
            raise MaskLLMError(f"{path / LATEST}: holds {text[:40]!r}; wanted 'release' or an iteration number")
        path = path / iteration_name("release" if text == "release" else int(text))
        if not path.is_dir():
            raise MaskLLMError(f"{path}: no such directory, though {LATEST} beside it names it")
    if not (path / INFO).is_file():
        raise MaskLLMError(f"{path}: not a checkpoint, neither {LATEST} nor {INFO} is there; `maskllm convert` makes one")
    return Checkpoint(path, _iteration_of(path), _read_info(path / INFO))


def iteration_name(iteration: Iteration) -> str:
    """The name of an iteration's directory, as Megatron-LM has it."""
    return "release" if iteration == "release" else f"iter_{iteration:07d}"


def write_checkpoint(
    root: str | Path, tensors: Mapping[str, LazyTensor], info: CheckpointInfo, *, hf_files_from: Path, description: str
) -> Path:
    """Write `ROOT/release` from tensors that are made one at a time, in a single process; returns the iteration directory.

    It appears, replacing an older one, when it is complete. Side files are copied from the Hugging Face directory `hf_files_from`.
    Raises MaskLLMError where ROOT/release is something else than a checkpoint.
    """
    root = Path(root)
    path = root / iteration_name("release")
    if path.exists() and not (path / INFO).is_file():
        raise MaskLLMError(f"{path}: exists and is not a checkpoint of this program; remove it or name another --output")
    with atomic_directory(path) as temporary:
        write_tensors(temporary, tensors, description)
        _write_side_files(temporary, info, hf_files_from)
    write_text(root / LATEST, "release\n")
    return path


def save_checkpoint(
    root: str | Path, iteration: Iteration, sharded_state_dict: dict[str, Any], info: CheckpointInfo, *, hf_files_from: Path
) -> Path:
    """Write an iteration from every rank's sharded state dict with Megatron's `dist_checkpointing.save`; returns its directory.

    Called by all ranks of the default process group. The directory takes its name, and becomes the latest, once every rank has
    written its part. A failure on one rank is raised on all.
    """
    root = Path(root)
    path = root / iteration_name(iteration)
    temporary = path.with_name(f".{path.name}.tmp")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def publish() -> None:
        _write_side_files(temporary, info, hf_files_from)
        publish_directory(temporary, path)
        write_text(root / LATEST, f"{iteration}\n")

    _on_first_rank(prepare)
    with _one_line(f"{path}: cannot be written"):
        dist_checkpointing.save(_without_extra_state(sharded_state_dict), str(temporary))
    _on_first_rank(publish)
    return path


def _write_side_files(directory: Path, info: CheckpointInfo, hf_files_from: Path) -> None:
    copy_side_files(hf_files_from, directory / "hf")
    write_json(directory / INFO, {"format_version": FORMAT_VERSION, **dataclasses.asdict(info)})


def _read_info(path: Path) -> CheckpointInfo:
    values = read_json_object(path)
    version = values.pop("format_version", None)
    if not isinstance(version, int) or version < 1:
        raise MaskLLMError(f"{path}: format_version is {version!r}; wanted a positive integer")
    if version > FORMAT_VERSION:
        raise MaskLLMError(f"{path}: format_version {version} is newer than this program's {FORMAT_VERSION}; update maskllm")
    try:
        return CheckpointInfo(**values)
    except TypeError as error:
        raise MaskLLMError(f"{path}: {error}") from None
    except MaskLLMError as error:
        raise MaskLLMError(f"{path}: {error}") from None


def _iteration_of(path: Path) -> Iteration:
    match = re.fullmatch(r"iter_(\d+)", path.name)
    return int(match[1]) if match else "release"


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Without the `_extra_state` objects: the state of 8-bit training, empty here, which converted checkpoints do not have."""
    return {
        key: _without_extra_state(value) if isinstance(value, dict) else value
        for key, value in state.items()
        if not (isinstance(value, ShardedObject) and value.key.endswith("_extra_state"))
    }


def _sharded_tensors(value: Any) -> list[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        return [value]
    if isinstance(value, ShardedTensorFactory):
        return _sharded_tensors(value.build())
    if isinstance(value, dict | list):
        return [tensor for part in (value.values() if isinstance(value, dict) else value) for tensor in _sharded_tensors(part)]
    return []


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what Megatron and PyTorch raise for files that are missing, damaged or cannot be written into a MaskLLMError."""
    try:
        yield
    except CheckpointException as error:  # a BaseException that holds the ranks' own
        cause, _ = next(iter(error.failures.values()))
        raise MaskLLMError(f"{what} ({_first_line(cause)})") from error
    except Exception as error:  # a damaged file raises nearly anything
        raise MaskLLMError(f"{what} ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")


def _on_first_rank(action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait; an exception there is raised everywhere."""
    failure: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failure[0] = str(error)
            torch.distributed.broadcast_object_list(failure)
            raise
    torch.distributed.broadcast_object_list(failure)
    if failure[0] is not None and torch.distributed.get_rank() != 0:
        raise MaskLLMError(f"rank 0: {failure[0]}")
