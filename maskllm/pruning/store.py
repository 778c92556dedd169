"""Stores finished layers on disk, so that an interrupted run can continue after the last one."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed as dist

from maskllm.errors import MaskLLMError
from maskllm.files import atomic_file, explain_safetensors_errors, read_json_object, write_json
from maskllm.patterns import pack_mask, unpack_mask
from maskllm.pruning.solve import PrunedMatrix

logger = logging.getLogger(__name__)

_RUN = "run.json"

_FORMAT = 2
"""Of the layers' files. In 2, a weight has the dtype that it is stored in; in 1, it had the dtype that the layers computed in."""


class DirectoryStore:
    """A directory with one safetensors file per layer: mask bits, updated weights, report.

    The ranks of a job share it: rank 0 writes, all ranks read.
    """

    def __init__(self, directory: Path, run: dict[str, Any]) -> None:
        """Open `directory` for the run that the JSON values `run` describe. Layers of any other run are deleted.

        All ranks of the default process group must call it.
        """
        self.directory = directory
        run = {"format": _FORMAT, **run}
        finished: list[list[int]] = [[]]
        if dist.get_rank() == 0:
            if (directory / _RUN).is_file() and read_json_object(directory / _RUN) == run:
                finished[0] = sorted(int(file.stem.split("_")[1]) for file in directory.glob("layer_*.safetensors"))
                logger.info("%s: continuing after %d finished layers", directory, len(finished[0]))
            else:
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir(parents=True)
                write_json(directory / _RUN, run)
        dist.broadcast_object_list(finished)
        self.finished = frozenset(finished[0])

    def load(self, index: int) -> dict[str, PrunedMatrix]:
        """The matrices of a finished layer. Raises MaskLLMError if its file cannot be read."""
        path = self._path(index)
        try:
            with safe_open(path, framework="pt") as file:
                keys = set(file.keys())
                pruned = {}
                for name, entry in json.loads(file.metadata()["matrices"]).items():
                    mask = unpack_mask(file.get_tensor(f"{name}.mask_bits"), entry["in_features"])
                    weight = file.get_tensor(f"{name}.weight") if f"{name}.weight" in keys else None
                    pruned[name] = PrunedMatrix(mask, weight, entry["report"])
                return pruned
        except (OSError, SafetensorError) as error:
            raise MaskLLMError(f"{path}: cannot be read ({error}); delete {self.directory} to start over") from None

    def save(self, index: int, pruned: dict[str, PrunedMatrix]) -> None:
        """Write a finished layer. Raises MaskLLMError if its file cannot be written."""
        if dist.get_rank() != 0:
            return
        tensors: dict[str, torch.Tensor] = {}
        entries = {}
        for name, matrix in pruned.items():
            tensors[f"{name}.mask_bits"] = pack_mask(matrix.mask).cpu()
            if matrix.weight is not None:
                tensors[f"{name}.weight"] = matrix.weight.cpu().contiguous()
            entries[name] = {"in_features": matrix.mask.shape[1], "report": matrix.report}
        path = self._path(index)
        with atomic_file(path) as temporary, explain_safetensors_errors(path):
            save_file(tensors, temporary, metadata={"matrices": json.dumps(entries)})

    def tensor(self, index: int, name: str) -> torch.Tensor:
        """One tensor of a finished layer: MATRIX.mask_bits, or MATRIX.weight if the weights were updated."""
        with safe_open(self._path(index), framework="pt") as file:
            return file.get_tensor(name)

    def remove(self) -> None:
        """Delete the directory."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, index: int) -> Path:
        return self.directory / f"layer_{index:05d}.safetensors"
