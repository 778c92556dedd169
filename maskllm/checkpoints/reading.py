"""One iteration of a checkpoint directory, opened for reading: tensors one at a time, or a whole model on all ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from maskllm.checkpoints.checksums import MANIFEST, Manifest
from maskllm.checkpoints.finding import LATEST, Iteration, is_complete, iteration_number, iterations, what_is_missing
from maskllm.checkpoints.info import INFO, CheckpointInfo, read_info
from maskllm.checkpoints.torch_dist import TensorReader, is_short_write
from maskllm.distributed import lost_connection, raised_together, rank_and_size
from maskllm.errors import MaskLLMError, first_line
from maskllm.families.mapping import Vocabulary
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import parameter_map, read_model_config


@dataclass(frozen=True)
class Checkpoint:
    """One iteration of a checkpoint directory, opened for reading."""

    path: Path
    """The iteration directory."""
    iteration: Iteration
    info: CheckpointInfo
    manifest: Manifest
    """The checksums of its files."""

    @property
    def hf_directory(self) -> Path:
        """The original's config, tokenizer and other `side_files`."""
        return self.path / "hf"

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """The architecture, with the vocabulary's padding that this checkpoint's embedding has.

        Raises MaskLLMError if the config is missing or not supported, or if there is no embedding.
        """
        config = read_model_config(self.hf_directory / "config.json")
        embedding = next(mapping.megatron for mapping in parameter_map(config) if isinstance(mapping, Vocabulary))
        return dataclasses.replace(config, vocab_padding=max(0, self.tensors[embedding].shape[0] - config.vocab_size))

    @functools.cached_property
    def tensors(self) -> TensorReader:
        """Its tensors by key. A tensor is read, and the checksums of its files are verified, when its `load` is called.

        Raises MaskLLMError if the index cannot be read.
        """
        return TensorReader(self.path, self.manifest.verify)

    @functools.cached_property
    def has_mask_bits(self) -> bool:
        """Whether it holds one-shot or fixed masks, as `mask_bits`."""
        return f"{self._first_linear}.mask_bits" in self.tensors

    @functools.cached_property
    def has_mask_logits(self) -> bool:
        """Whether it holds masks that are learned, as `mask_logits`. They count before `mask_bits`, which are then their prior."""
        return f"{self._first_linear}.mask_logits" in self.tensors

    @functools.cached_property
    def has_weight_scales(self) -> bool:
        """Whether CAST trained it: dense weights with `weight_scales`. Its final masks are by magnitude; `mask_bits` are the last used."""
        return f"{self._first_linear}.weight_scales" in self.tensors

    @property
    def _first_linear(self) -> str:
        """The first masked linear. All linears have the same kinds of masks."""
        return next(mapping.linear for mapping in parameter_map(self.model_config) if mapping.linear is not None)

    def manifest_digest(self) -> str:
        """The SHA-256 of the manifest, which names this checkpoint by the contents of all its files."""
        return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    def verify(self) -> None:
        """Compare the checksums of all files; each rank of the job reads its share of them.

        All ranks of the job must call this. Raises MaskLLMError, on all of them, naming a damaged file.
        """
        names = sorted(self.manifest.files, key=lambda name: (-self.manifest.files[name].bytes, name))
        rank, ranks = rank_and_size()
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        with raised_together():
            self.manifest.verify(names[rank::ranks], threads=max(1, min(8, (os.cpu_count() or 1) // neighbours)))
        self.manifest.assume_verified(names)

    def check_weights(self) -> None:
        """Raise MaskLLMError naming the first weight that is missing or has another shape than the config asks for."""
        for mapping in parameter_map(self.model_config):
            self.check_shape(mapping.megatron, mapping.megatron_shape(self.model_config))

    def check_shape(self, key: str, wanted: tuple[int, ...]) -> None:
        """Raise MaskLLMError if the tensor `key` is missing or has another shape than `wanted`."""
        found = self.tensors[key].shape
        if found != wanted:
            raise MaskLLMError(f"{self.path}: tensor {key} has shape {list(found)}; the model's config asks for {list(wanted)}")

    def load(self, sharded_state_dict: dict[str, Any]) -> dict[str, Any]:
        """Megatron's `dist_checkpointing.load` of a sharded state dict that was made under any parallel layout; all ranks call it.

        Returns the state dict with tensors in place of `ShardedTensor`s. Raises MaskLLMError naming the first tensor that the
        checkpoint lacks or holds with another global shape, or a damaged file. Only the vocabulary's padding may differ.
        """
        self.verify()
        sharded_state_dict = without_extra_state(sharded_state_dict)
        for tensor in _sharded_tensors(sharded_state_dict):
            rows, *others = tensor.global_shape
            if tensor.allow_shape_mismatch:  # Megatron's mark of the vocabulary's matrices
                rows = self.model_config.dimensions()["vocab"]
            self.check_shape(tensor.key, (rows, *others))
        with one_line(f"{self.path}: cannot be loaded"):
            return dist_checkpointing.load(sharded_state_dict, str(self.path))


def resolve(path: str | Path) -> Checkpoint:
    """Open a checkpoint: an iteration directory, or the best iteration of a checkpoint directory (`finding.iterations`).

    Raises MaskLLMError if `path` is neither, was written by a newer version of this program, or is visibly damaged: files that are
    missing or have another size, or small ones with another checksum. The tensors are not read.
    """
    return open_iteration(iterations(path)[0])


def open_iteration(path: Path) -> Checkpoint:
    """Open an iteration directory. Raises MaskLLMError as `resolve` does."""
    if not path.is_dir():
        raise MaskLLMError(f"{path}: no such directory, though {LATEST} beside it names it")
    if not is_complete(path):
        raise MaskLLMError(f"{path}: {what_is_missing(path)}; make the checkpoint again")
    manifest = Manifest.read(path)
    manifest.verify(name for name in manifest.files if not name.endswith(".distcp"))  # those hold the tensors
    info = read_info(path)
    # A trained checkpoint knows its iteration even if its directory has been renamed.
    iteration = info.details.get("iteration") if info.stage == "trained" else iteration_number(path) or "release"
    if iteration != "release" and not isinstance(iteration, int):
        raise MaskLLMError(f"{path / INFO}: details.iteration is {iteration!r}; wanted the number of steps done")
    return Checkpoint(path, iteration, info, manifest)


def load_model(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Fill a Megatron model, and its mask tensors if it has any, from a checkpoint written under any layout.

    All ranks call this. Raises MaskLLMError as `Checkpoint.load` does.
    """
    load_tensors(model, checkpoint.load({"model": model.sharded_state_dict()})["model"])


def load_tensors(model: torch.nn.Module, tensors: dict[str, Any]) -> None:
    """`load_state_dict`, strict about everything except the `_extra_state` of Megatron's and Transformer Engine's modules.

    `_extra_state` is the state of 8-bit training, which checkpoints here do not hold. Raises MaskLLMError naming the first other
    tensor that only `model` or only `tensors` has.
    """
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    wrong = [name for name in missing if not name.endswith("._extra_state")] + unexpected
    if wrong:
        raise MaskLLMError(f"the model and the loaded tensors differ in {wrong[0]}, and {len(wrong) - 1} others")


def without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict without `_extra_state` objects: the state of 8-bit training, empty here and not in converted checkpoints."""
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
    """A block in which Megatron or PyTorch read or write files: what they raise becomes a MaskLLMError that starts with `what`.

    A lost connection to another rank is raised as it is.
    """
    try:
        yield
    except CheckpointException as error:  # a BaseException; `failures` holds the ranks' errors, or nothing on some ranks
        cause = next((cause for cause, _ in error.failures.values()), None)
        raise MaskLLMError(f"{what} ({_reason(cause) if cause else 'another rank could not'})") from error
    except MaskLLMError:
        raise
    except Exception as error:  # a damaged file raises nearly anything
        if lost_connection(error):
            raise
        raise MaskLLMError(f"{what} ({_reason(error)})") from error


def _reason(error: BaseException) -> str:
    if is_short_write(error):
        return "the disk is probably full"
    return first_line(error)
