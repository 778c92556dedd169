"""A Hugging Face checkpoint on disk or on the hub: its directory, and the files in it that are not weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskllm.errors import MaskLLMError, first_line
from maskllm.huggingface.tensors import INDEX

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
        raise MaskLLMError(
            f"{directory_or_id}: no such directory, and the hub does not give it: {first_line(error, with_type=False)}"
        ) from None


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
