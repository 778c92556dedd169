"""The hash of a checkpoint's weights: it names the tensors, not the files that hold them.

The hash is the SHA-256 of one line a tensor, sorted by the tensor's name. A line has the name, the dtype ("bfloat16"), the shape
("64,32") and the SHA-256 of the tensor's bytes (little-endian and row-major, as in a safetensors file), separated by tabs. So the
hash is the same for one file or many shards, for any order of the tensors in them, and for any metadata. It changes with a tensor's
name, dtype, shape or any of its bits. A tied tensor that is stored twice counts twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from maskllm.dtypes import dtype_name
from maskllm.errors import MaskLLMError
from maskllm.files import read_json_object, write_json
from maskllm.huggingface.side_files import HASH_FILE
from maskllm.huggingface.tensors import HFTensors


class WeightsHash:
    """Collects tensors in any order; one at a time has to be in memory."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor of any shape and dtype, which is on the CPU."""
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        shape = ",".join(map(str, tensor.shape))
        self._lines[name] = f"{name}\t{dtype_name(tensor.dtype)}\t{shape}\t{hashlib.sha256(data).hexdigest()}\n"

    def hexdigest(self) -> str:
        """The hash of all tensors so far: 64 hexadecimal digits."""
        return hashlib.sha256("".join(self._lines[name] for name in sorted(self._lines)).encode()).hexdigest()


def weights_sha256(directory: Path) -> str:
    """The hash of the safetensors that transformers loads from `directory`, read one tensor at a time.

    Raises MaskLLMError as `HFTensors` does.
    """
    tensors = HFTensors(directory)
    found = WeightsHash()
    for name in tqdm(tensors.names, desc="hash weights", unit="tensor", disable=None, leave=False):
        found.add(name, tensors.load(name))
    return found.hexdigest()


@dataclass(frozen=True)
class StatedHash:
    """What HASH_FILE says of the weights beside it."""

    weights_sha256: str
    kept_weights: str | None = None
    """What changed the kept weights, such as TRAINED; None if they are the dense model's."""


TRAINED = "trained"
"""`StatedHash.kept_weights` of a training, which may have changed any tensor."""


def write_hash(directory: Path, stated: StatedHash) -> None:
    """Write HASH_FILE of a directory: `{"weights_sha256": ...}`, and `kept_weights` if they changed. No other checkpoint gets it."""
    write_json(directory / HASH_FILE, {key: value for key, value in dataclasses.asdict(stated).items() if value is not None})


def read_hash(directory: Path) -> StatedHash | None:
    """What HASH_FILE of a directory says; None without that file. Raises MaskLLMError if it cannot be read."""
    path = directory / HASH_FILE
    if not path.exists():
        return None
    values = read_json_object(path)
    stated, kept = values.get("weights_sha256"), values.get("kept_weights")
    if not isinstance(stated, str) or not isinstance(kept, str | None):
        raise MaskLLMError(
            f"{path}: weights_sha256 is {stated!r} and kept_weights {kept!r}; wanted text; remove the file or write it again"
        )
    return StatedHash(stated, kept)
