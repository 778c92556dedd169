"""The checkpoint directory: where each iteration lies, what it is, and how it gets there whole.

CKPT/latest_checkpointed_iteration.txt    "release" or a number, as Megatron-LM writes it
CKPT/release/, CKPT/iter_0000010/         one iteration each:
    *.distcp, .metadata, metadata.json, common.pt      Megatron Core's torch_dist format
    hf/                                   config.json, generation_config.json and tokenizer files of the original
    maskllm.json                          what the tensors are: stage, pattern, origin (`CheckpointInfo`)
    manifest.json                         size and checksum of every other file (`maskllm.checkpoints.checksums`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from maskllm.checkpoints.checksums import MANIFEST, Manifest, write_manifest
from maskllm.checkpoints.torch_dist import LazyTensor, TensorReader, write_tensors
from maskllm.distributed import lost_connection, raised_together
from maskllm.errors import MaskLLMError, first_line
from maskllm.families.hf_config import read_json_object
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import parameter_map, read_model_config
from maskllm.files import atomic_directory, write_json, write_text
from maskllm.huggingface.directory import read_side_files, write_side_files
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
        if not isinstance(self.details, dict):
            raise MaskLLMError(f"details {self.details!r}; wanted a JSON object")
        if self.pattern is not None and not isinstance(self.pattern, str):
            raise MaskLLMError(f"pattern {self.pattern!r}; wanted N:M or {UNSTRUCTURED}")
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
    manifest: Manifest
    """Its files' checksums."""

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
        """Its tensors by key, each read, and the files it lies in verified, when asked for.

        Raises MaskLLMError where the index cannot be read.
        """
        return TensorReader(self.path, self.manifest.verify)

    def verify(self) -> None:
        """Compare the checksums of all files, each rank those of its share of them.

        Called by all ranks of the job, if there is one. Raises MaskLLMError, on all of them, naming the first damaged file found.
        """
        names = sorted(self.manifest.files, key=lambda name: (-self.manifest.files[name].bytes, name))
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with raised_together():
            self.manifest.verify(names[rank::ranks], threads=max(1, min(8, (os.cpu_count() or 1) // neighbours)))
        self.manifest.assume_verified(names)

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
        checkpoint lacks or holds with another global shape, and a file that is damaged.
        """
        self.verify()
        sharded_state_dict = without_extra_state(sharded_state_dict)
        for tensor in _sharded_tensors(sharded_state_dict):
            self.check_shape(tensor.key, tuple(tensor.global_shape))
        with one_line(f"{self.path}: cannot be loaded"):
            return dist_checkpointing.load(sharded_state_dict, str(self.path))


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def resolve(path: str | Path, *, say: Callable[[str], None] = _to_stderr) -> Checkpoint:
    """Open a checkpoint: an iteration directory, or the first of `iterations(path)`.

    Raises MaskLLMError where `path` is neither, was written by a newer version of this program, or is damaged as far as can be told
    without reading the tensors: files that are missing, that have another size, or small ones whose checksum differs.
    """
    return open_iteration(iterations(path, say=say)[0])


def iterations(path: str | Path, *, fall_back: bool = False, say: Callable[[str], None] = _to_stderr) -> list[Path]:
    """The iteration directories that a run can go on from, best first: the one `latest_checkpointed_iteration.txt` names, then older ones.

    Where that file is missing or no text, names one that is not complete, or the one before the newest and is older than that (a
    save was killed before it wrote the file), the newest complete one comes first.
    Directories that are not complete are left out. `say` is called with a line about what is newer than the first, and about a file that
    is no text. An iteration directory gives itself alone. Raises MaskLLMError where there is none, and where that file holds other words;
    with `fall_back` those count as no text.
    """
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such directory"
        raise MaskLLMError(f"{path}: {found}; wanted a checkpoint that `maskllm convert` or training wrote")
    if (path / INFO).is_file() or is_complete(path):
        return [path]
    latest = _named_by_latest(path, fall_back, say)
    if latest is not None and latest.name == "release":
        return [latest]
    found = sorted(((number, entry) for entry in path.iterdir() if (number := iteration_number(entry)) is not None), reverse=True)
    complete = [entry for _, entry in found if is_complete(entry)]
    if latest is not None and is_complete(latest):
        if complete[1:2] == [latest] and _time_of(complete[0] / MANIFEST) > _time_of(path / LATEST):
            say(f"{complete[0]}: complete, and newer than {LATEST}, which names {latest.name}; using {complete[0].name}")
            return complete
        for entry in complete[: complete.index(latest)]:
            say(f"{entry}: newer than {latest.name}, which {LATEST} names; ignored")
        return complete[complete.index(latest) :]
    if not complete:
        if is_complete(path / "release"):
            complete = [path / "release"]
        elif latest is not None:
            raise MaskLLMError(f"{latest}: {_what_lacks(latest)}, though {LATEST} beside it names it; there is no other to use")
        else:
            raise MaskLLMError(f"{path}: not a checkpoint, it has no complete iteration; `maskllm convert` makes one")
    for _, entry in found:
        if entry not in complete and iteration_number(entry) > (iteration_number(complete[0]) or 0):
            say(f"{entry}: {_what_lacks(entry)}; ignored")
    if latest is not None:
        say(f"{latest}: {_what_lacks(latest)}, though {LATEST} names it; using {complete[0].name}")
    return complete


def holds_checkpoint(path: str | Path) -> bool:
    """Whether there is, or by `latest_checkpointed_iteration.txt` ought to be, something to load at `path`."""
    path = Path(path)
    if not path.is_dir():
        return False
    return (
        (path / LATEST).is_file()
        or (path / INFO).is_file()
        or is_complete(path)
        or any(iteration_number(entry) is not None and is_complete(entry) for entry in path.iterdir())
    )


def open_iteration(path: Path) -> Checkpoint:
    """Open an iteration directory. Raises MaskLLMError as `resolve` does."""
    if not path.is_dir():
        raise MaskLLMError(f"{path}: no such directory, though {LATEST} beside it names it")
    if not is_complete(path):
        raise MaskLLMError(f"{path}: {_what_lacks(path)}; make the checkpoint again")
    manifest = Manifest.read(path)
    manifest.verify(name for name in manifest.files if not _holds_tensors(name))
    info = _read_info(path / INFO)
    # A trained one says itself which it is, whatever its directory is called by now.
    iteration = info.details.get("iteration") if info.stage == "trained" else iteration_number(path) or "release"
    if iteration != "release" and not isinstance(iteration, int):
        raise MaskLLMError(f"{path / INFO}: details.iteration is {iteration!r}; wanted the number of steps done")
    return Checkpoint(path, iteration, info, manifest)


def is_complete(directory: Path) -> bool:
    """Whether everything of the checkpoint in `directory` has been written, be it intact or not."""
    return (directory / MANIFEST).is_file()


def iteration_number(directory: Path) -> int | None:
    """The number in the name of an iteration's directory; None for other names."""
    match = re.fullmatch(r"iter_(\d+)", directory.name)
    return int(match[1]) if match else None


def _time_of(file: Path) -> int:
    """When it was written, in ns since 1970."""
    return file.stat().st_mtime_ns


def _named_by_latest(root: Path, fall_back: bool, say: Callable[[str], None]) -> Path | None:
    """The iteration directory that `latest_checkpointed_iteration.txt` names, if that is there and text.

    Raises MaskLLMError for other words, unless with `fall_back`.
    """
    if not (root / LATEST).is_file():
        return None
    text = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not text.isprintable() or not text:  # a disk that lost its contents
        say(f"{root / LATEST}: is empty or no text; ignored")
        return None
    if text != "release" and not re.fullmatch(r"\d{1,18}", text):
        problem = f"{root / LATEST}: holds {text[:40]!r}; wanted 'release' or an iteration number"
        if not fall_back:
            raise MaskLLMError(problem)
        say(f"{problem}; --auto-fallback: ignored")
        return None
    return root / iteration_name("release" if text == "release" else int(text))


def _what_lacks(directory: Path) -> str:
    return f"not complete, it has no {MANIFEST}" if directory.is_dir() else "no such directory"


def _holds_tensors(name: str) -> bool:
    return name.endswith(".distcp")


def iteration_name(iteration: Iteration) -> str:
    """The name of an iteration's directory, as Megatron-LM has it."""
    return "release" if iteration == "release" else f"iter_{iteration:07d}"


def write_checkpoint(
    root: str | Path, tensors: Mapping[str, LazyTensor], info: CheckpointInfo, *, hf_files_from: Path, description: str
) -> Path:
    """Write `ROOT/release` from tensors that are made one at a time, in a single process; returns the iteration directory.

    It appears, replacing an older one, when it is complete. What goes along is that of the Hugging Face directory `hf_files_from`.
    Raises as `release_directory` does.
    """
    path = release_directory(root, info.stage)
    with atomic_directory(path) as temporary:
        write_tensors(temporary, tensors, description)
        write_what_goes_along(temporary, info, read_side_files(hf_files_from))
        write_manifest(temporary)
    write_text(path.parent / LATEST, "release\n")
    return path


def release_directory(root: str | Path, stage: str) -> Path:
    """`ROOT/release`, which `write_checkpoint` will write, or replace by another of the same stage.

    Raises MaskLLMError where ROOT is a file or holds a training run, and where ROOT/release is something other than a checkpoint of this
    stage.
    """
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise MaskLLMError(f"{root}: is a file, wanted a directory to make; name another --output")
    if root.exists() and any(iteration_number(entry) is not None for entry in root.iterdir()):
        raise MaskLLMError(f"{root}: holds the checkpoints of a run; name another --output")
    path = root / iteration_name("release")
    if path.exists() and not (path / INFO).is_file():
        raise MaskLLMError(f"{path}: exists and is not a checkpoint of this program; remove it or name another --output")
    if path.exists() and (found := _read_info(path / INFO).stage) != stage:
        raise MaskLLMError(
            f"{path}: is a {found} checkpoint, not to be replaced by a {stage} one; remove it or name another --output"
        )
    return path


def write_what_goes_along(directory: Path, info: CheckpointInfo, hf_files: Mapping[Path, bytes]) -> None:
    """Write what a checkpoint holds beside its tensors, but for the manifest, into `directory`."""
    write_side_files(hf_files, directory / "hf")
    write_json(directory / INFO, {"format_version": FORMAT_VERSION, **dataclasses.asdict(info)})


def _read_info(path: Path) -> CheckpointInfo:
    values = read_json_object(path)
    version = values.pop("format_version", None)
    if not isinstance(version, int) or version < 1:
        raise MaskLLMError(f"{path}: format_version is {version!r}; wanted a positive integer")
    if version > FORMAT_VERSION:
        raise MaskLLMError(f"{path}: format_version {version} is newer than this program's {FORMAT_VERSION}; update maskllm")
    try:
        info = CheckpointInfo(**values)
        _ = info.block_pattern
        return info
    except TypeError as error:
        raise MaskLLMError(f"{path}: {error}") from None
    except MaskLLMError as error:
        raise MaskLLMError(f"{path}: {error}") from None


def without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Without the `_extra_state` objects: the state of 8-bit training, empty here, which converted checkpoints do not have."""
    return {
        key: without_extra_state(value) if isinstance(value, dict) else value
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
def one_line(what: str) -> Iterator[None]:
    """Turn what Megatron and PyTorch raise for files that are missing, damaged or cannot be written into a MaskLLMError."""
    try:
        yield
    except CheckpointException as error:  # a BaseException that holds the ranks' own, on the ranks that were told of them
        cause = next((cause for cause, _ in error.failures.values()), None)
        raise MaskLLMError(f"{what} ({_reason(cause) if cause else 'another rank could not'})") from error
    except MaskLLMError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        if lost_connection(error):
            raise
        raise MaskLLMError(f"{what} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    if "inline_container" in str(error):  # torch.save's own complaint about a short write
        return "the disk is probably full"
    return first_line(error)
