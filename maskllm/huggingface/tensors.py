"""The safetensors of a Hugging Face checkpoint, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from maskllm.dtypes import BY_SAFETENSORS
from maskllm.errors import MaskLLMError
from maskllm.files import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HFTensors:
    """The tensors of a safetensors checkpoint by name. Shapes and dtypes come from the headers; `load` reads the data."""

    def __init__(self, directory: Path, base_prefix: str) -> None:
        """Read the headers of all files.

        If no name starts with `base_prefix` (such as "model."), the checkpoint is one of the base model alone, as GPT-2's original
        is. Here its tensors have the names that they have in the whole model, with the prefix. Raises MaskLLMError if files are
        missing, damaged, or in another format than safetensors.
        """
        self.directory = directory
        self._files: dict[str, str] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for name in self._file_names():
            self._read_header(name)
        self._missing_prefix = "" if any(name.startswith(base_prefix) for name in self._files) else base_prefix
        if self._missing_prefix:
            self._files = {base_prefix + name: file for name, file in self._files.items()}
            self._headers = {base_prefix + name: header for name, header in self._headers.items()}

    def _file_names(self) -> list[str]:
        if (self.directory / INDEX).is_file():
            weight_map = read_json_object(self.directory / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise MaskLLMError(f"{self.directory / INDEX}: weight_map is missing or does not map tensor names to files")
            names = sorted(set(weight_map.values()))
            for name in names:
                if Path(name).name != name or not (self.directory / name).is_file():
                    raise MaskLLMError(f"{self.directory / INDEX}: names the file {name!r}, which is not in its directory")
            return names
        if (self.directory / SINGLE).is_file():
            return [SINGLE]
        if any(self.directory.glob("*.bin")):
            raise MaskLLMError(
                f"{self.directory}: has only pickled weights (.bin), which can run code when read; load it once with "
                "transformers and write it back with model.save_pretrained(DIR, safe_serialization=True)"
            )
        raise MaskLLMError(f"{self.directory}: neither {SINGLE} nor {INDEX} is there; wanted a Hugging Face checkpoint")

    def _read_header(self, name: str) -> None:
        path = self.directory / name
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (a safe_open is not a dict)
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

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise MaskLLMError(f"{self.directory}: has no tensor {name}")
        return self._headers[name]

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor. The file is opened for this tensor only: an open file would keep the pages of earlier tensors in memory.

        Raises MaskLLMError if there is no such tensor or it cannot be read.
        """
        self._header(name)
        path = self.directory / self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name.removeprefix(self._missing_prefix))
        except SafetensorError as error:
            raise MaskLLMError(f"{path}: tensor {name} cannot be read: {error}") from None
