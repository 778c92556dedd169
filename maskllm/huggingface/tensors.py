"""The safetensors of a Hugging Face checkpoint, one tensor in memory at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from maskllm.dtypes import BY_SAFETENSORS
from maskllm.errors import MaskLLMError
from maskllm.files import check_not_lfs_pointer, read_json_object

INDEX_ENDING = ".index.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

NEEDS_MASKLLM = "pip install maskllm and import maskllm first.safetensors"
"""The weights that the config.json of a compressed checkpoint names, through an index of this name and `.index.json`.

There is no such file: transformers without maskllm would fill in random weights, and so it ends in an error with this name.
"""


class HFTensors:
    """The tensors of a safetensors checkpoint by name. Shapes and dtypes come from the headers; `load` reads the data.

    The files are those that transformers loads (`weight_files`). If two of them hold a tensor of one name, the index decides.
    """

    def __init__(self, directory: Path, files: Sequence[str] | None = None) -> None:
        """Read the headers of all files, or of those named `files` in the directory.

        Says on stderr if there are other weights, which are ignored. Raises MaskLLMError if files are missing, damaged, or in
        another format than safetensors.
        """
        self.directory = directory
        self.has_duplicates = False
        """Whether two files hold a tensor of one name. transformers does not ask the index then."""
        self._files: dict[str, str] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        names, weight_map = weight_files(directory) if files is None else (list(files), {})
        if not names and any(directory.glob("*.bin")):
            raise MaskLLMError(
                f"{directory}: has only pickled weights (.bin), which can run code when read; load it once with "
                "transformers and write it back with model.save_pretrained(DIR, safe_serialization=True)"
            )
        if not names:
            raise MaskLLMError(f"{directory}: neither {SINGLE} nor {INDEX} is there; wanted a Hugging Face checkpoint")
        for name in names:
            self._read_header(name, weight_map)
        if files is None:
            _say_what_is_ignored(directory, names)

    def _read_header(self, name: str, weight_map: dict[str, str]) -> None:
        path = self.directory / name
        check_not_lfs_pointer(path)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (a safe_open is not a dict)
                    if key in self._files:
                        self.has_duplicates = True
                        if weight_map.get(key) == self._files[key]:
                            continue
                    part = file.get_slice(key)
                    self._files[key] = name
                    self._headers[key] = (tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise MaskLLMError(f"{path}: not a readable safetensors file: {error}") from None

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises MaskLLMError if there is no such tensor."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype. Raises MaskLLMError if there is no such tensor, or if its type is not in `maskllm.dtypes`."""
        dtype = self._header(name)[1]
        if dtype not in BY_SAFETENSORS:
            raise MaskLLMError(f"{self.directory}: tensor {name} is of type {dtype}; wanted one of {', '.join(BY_SAFETENSORS)}")
        return BY_SAFETENSORS[dtype]

    def stored_dtype(self, name: str) -> str:
        """The name that safetensors has for a tensor's dtype, of any kind. Raises MaskLLMError if there is no such tensor."""
        return self._header(name)[1]

    def file(self, name: str) -> Path:
        """The file that holds a tensor. Raises MaskLLMError if there is no such tensor."""
        self._header(name)
        return self.directory / self._files[name]

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise MaskLLMError(f"{self.directory}: has no tensor {name}")
        return self._headers[name]

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor. The file is opened for this tensor only: an open file would keep the pages of earlier tensors in memory.

        Raises MaskLLMError if there is no such tensor or it cannot be read.
        """
        path = self.file(name)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise MaskLLMError(f"{path}: tensor {name} cannot be read: {error}") from None


def weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the safetensors files that transformers loads, and the index: tensor name -> file name, empty without an index.

    The order is that of transformers' `_get_resolved_checkpoint_files`: the file or index that config.json names
    (`transformers_weights`, which of a compressed checkpoint means nothing), then model.safetensors, then the index. Without any of
    them the list is empty. Raises MaskLLMError if the index cannot be read or names a file that is not there.
    """
    stated = read_json_object(directory / "config.json").get("transformers_weights")
    stated = None if stated == NEEDS_MASKLLM + INDEX_ENDING else stated
    for name in (SINGLE, INDEX) if stated is None else (stated,):
        if not (isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json")) and Path(name).name == name):
            raise MaskLLMError(
                f"{directory / 'config.json'}: transformers_weights is {name!r}; wanted the name of a .safetensors file or of an index"
            )
        if not (directory / name).is_file():
            continue
        return ([name], {}) if name.endswith(".safetensors") else _indexed_files(directory / name)
    if stated is not None:
        raise MaskLLMError(f"{directory / 'config.json'}: transformers_weights names the file {stated!r}, which is not there")
    return [], {}


def _indexed_files(index: Path) -> tuple[list[str], dict[str, str]]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise MaskLLMError(f"{index}: weight_map is missing or does not map tensor names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise MaskLLMError(f"{index}: names the file {name!r}, which is not in its directory")
    return names, weight_map


def _say_what_is_ignored(directory: Path, names: list[str]) -> None:
    others = {file.name for pattern in ("*.safetensors", "pytorch_model*.bin") for file in directory.glob(pattern)} - set(names)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        print(
            f"{directory}: reads {names[0]}{' and so on' if len(names) > 1 else ''}, as transformers does; other weights are there "
            f"and ignored: {min(others)}{more}",
            file=sys.stderr,
            flush=True,
        )
