"""A Hugging Face checkpoint on disk or on the hub: its safetensors, one tensor at a time, and the files that go along."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from maskllm.errors import MaskLLMError
from maskllm.families.hf_config import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

SUBDIRECTORIES = ("*/*.safetensors", "[!a]*/*")
"""What is not wanted of a repository's directories: weights, which are of another format there, and all in those whose name does not begin
with an a, as additional_chat_templates does. The hub's * takes slashes."""

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files that a checkpoint needs beside its weights, and the terms under which it may be passed on."""

FILES = ("*.safetensors", INDEX, *SIDE_FILES)
"""What is taken of a repository on the hub."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes a weight may have, by their names in safetensors."""


def find_source(directory_or_id: str | Path, files: Sequence[str] = FILES) -> Path:
    """The directory of a Hugging Face checkpoint: itself, or a hub id's after downloading those of its files that match `files`.

    Raises MaskLLMError where there is no such directory and the hub does not have it either.
    """
    path = Path(directory_or_id)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise MaskLLMError(f"{path / 'config.json'}: no such file; wanted the directory of a Hugging Face checkpoint")
        return path
    if path.exists():
        raise MaskLLMError(f"{path}: is a file; wanted the directory of a Hugging Face checkpoint")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(directory_or_id)):
        raise MaskLLMError(f"{path}: no such directory, and not a hub id like meta-llama/Llama-3.2-1B")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(directory_or_id), allow_patterns=list(files), ignore_patterns=list(SUBDIRECTORIES)))
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MaskLLMError(f"{directory_or_id}: no such directory, and the hub does not give it: {reason}") from None


def read_side_files(source: Path) -> dict[Path, bytes]:
    """The files of the directory `source` that match SIDE_FILES, by their place in it.

    Raises MaskLLMError where config.json, without which nothing can be loaded, is missing.
    """
    if not (source / "config.json").is_file():
        raise MaskLLMError(f"{source / 'config.json'}: no such file")
    files = (file for pattern in SIDE_FILES for file in source.glob(pattern) if file.is_file())
    return {file.relative_to(source): file.read_bytes() for file in files}


def write_side_files(files: Mapping[Path, bytes], target: Path) -> None:
    """Write what `read_side_files` has read into the directory `target`, made if it is not there."""
    for place, contents in files.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_bytes(contents)


class HFTensors:
    """The tensors of a safetensors checkpoint by name: shape and dtype from the headers, data when asked for."""

    def __init__(self, directory: Path, base_prefix: str) -> None:
        """Read the headers.

        Where no name starts with `base_prefix` ("model."), the checkpoint is one of the bare base model, as GPT-2's original is; its
        tensors then go by their names in the whole model. Raises MaskLLMError where files are missing, damaged, or in another format
        than safetensors.
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
        """A tensor's shape. Raises MaskLLMError where there is no such tensor."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype. Raises MaskLLMError where there is no such tensor or it is not of a plain floating-point type."""
        dtype = self._header(name)[1]
        if dtype not in DTYPES:
            raise MaskLLMError(f"{self.directory}: tensor {name} is of type {dtype}; wanted one of {', '.join(DTYPES)}")
        return DTYPES[dtype]

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise MaskLLMError(f"{self.directory}: has no tensor {name}")
        return self._headers[name]

    def load(self, name: str) -> torch.Tensor:
        """The tensor. The file is opened for it alone, so that pages of others read before do not stay mapped."""
        self._header(name)
        path = self.directory / self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name.removeprefix(self._missing_prefix))
        except SafetensorError as error:
            raise MaskLLMError(f"{path}: tensor {name} cannot be read: {error}") from None
