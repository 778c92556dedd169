"""The directory of a Hugging Face checkpoint, on disk or downloaded from the hub, and the files in it that are not weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskllm.errors import MaskLLMError, first_line
from maskllm.huggingface.tensors import INDEX

IGNORED = ("*/*.safetensors", "[!a]*/*")
"""Files in subdirectories of a hub repository that are not downloaded: weights, which are in another format there, and all files in
directories with names that do not start with "a". That leaves additional_chat_templates. In the hub's patterns * matches slashes.
"""

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
"""The files that a checkpoint needs beside its weights, and the licenses that must be passed on with it."""

FILES = ("*.safetensors", INDEX, *SIDE_FILES)
"""The files that are downloaded from a repository on the hub."""


def find_source(directory_or_id: str | Path, files: Sequence[str] = FILES) -> Path:
    """The directory of a Hugging Face checkpoint. For a hub id, downloads the files that match `files` and returns their directory.

    Raises MaskLLMError if there is no such directory and the hub does not provide it either.
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
        return Path(snapshot_download(str(directory_or_id), allow_patterns=list(files), ignore_patterns=list(IGNORED)))
    except Exception as error:  # the hub's client raises errors of its own, of requests and of httpx
        raise MaskLLMError(
            f"{directory_or_id}: no such directory, and the hub does not give it: {first_line(error, with_type=False)}"
        ) from None


def read_side_files(source: Path) -> dict[Path, bytes]:
    """The contents of the files in `source` that match SIDE_FILES, by path relative to `source`.

    Raises MaskLLMError if config.json is missing, because no checkpoint can be loaded without it.
    """
    if not (source / "config.json").is_file():
        raise MaskLLMError(f"{source / 'config.json'}: no such file")
    files = (file for pattern in SIDE_FILES for file in source.glob(pattern) if file.is_file())
    return {file.relative_to(source): file.read_bytes() for file in files}


def write_side_files(files: Mapping[Path, bytes], target: Path) -> None:
    """Write what `read_side_files` has read into the directory `target`, which is made if necessary."""
    for place, contents in files.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_bytes(contents)
