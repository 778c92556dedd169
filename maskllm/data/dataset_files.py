"""The names of the two files of a Megatron indexed dataset."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".bin", ".idx")
"""The endings that follow a dataset's prefix in the names of its files: tokens and index."""


def dataset_files(prefix: str | os.PathLike) -> tuple[Path, Path]:
    """The paths of a dataset's tokens (.bin) and of its index (.idx)."""
    tokens, index = (Path(f"{os.fspath(prefix)}{suffix}") for suffix in SUFFIXES)
    return tokens, index


def document_prefix(output_prefix: str | os.PathLike, json_key: str) -> str:
    """The prefix of the dataset that `maskllm preprocess --output-prefix P --json-key KEY` writes: P_KEY_document."""
    return f"{os.fspath(output_prefix)}_{json_key}_document"
