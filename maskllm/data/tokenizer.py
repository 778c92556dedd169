"""Tokenizers, from the files of the model itself: `tokenizer.json` and SentencePiece's `tokenizer.model`.

The library that defines a file's format reads it, so that the tokens do not depend on the version of transformers. A
`tokenizer.json` is read by tokenizers and gives what its post-processor adds, as `tokenizer(text).input_ids` of transformers and
Megatron-LM's `_HuggingFaceTokenizer` do (since megatron-core 0.15 with `--tokenizer-hf-include-special-tokens`). A SentencePiece
model gives BOS and the text's pieces, as Megatron-LM's `_Llama2Tokenizer` does. transformers reads what has neither file.

For some tokenizers, the library gigatoken gives the same tokens much faster. It is used if it is exact: see `GigatokenTokenizer`.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from maskllm.data.gigatoken_tokenizer import GigatokenTokenizer, InexactError
from maskllm.data.huggingface_tokenizer import HuggingFaceTokenizer, read_tokenizer_json, read_with_transformers
from maskllm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from maskllm.data.tokenizer_files import FILE_NAMES, TokenizerFiles, read_tokenizer_files
from maskllm.data.tokens import Tokenizer
from maskllm.errors import MaskLLMError
from maskllm.files import check_not_lfs_pointer

VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.bpe.model", "*.tiktoken", "tekken.json")
"""Files from which transformers can make a tokenizer if there is no `tokenizer.json` and no `tokenizer.model`."""


def load_tokenizer(path: str | os.PathLike, *, use_gigatoken: bool = True) -> Tokenizer:
    """Read a tokenizer from a Hugging Face directory or tokenizer.json, or a SentencePiece tokenizer.model.

    In a directory, tokenizer.json comes first, then tokenizer.model. transformers reads a directory with other vocabulary files, and
    a tokenizer.model in tiktoken's format. A file with one of these two names is read as its directory is: with the
    tokenizer_config.json and the other files beside it. Raises MaskLLMError for anything else, and for a git-lfs pointer.
    """
    path = Path(path)
    if not path.exists():
        raise MaskLLMError(f"{path}: no such tokenizer; wanted a directory with tokenizer.json, or a tokenizer.model file")
    reference = _read_directory(path) if path.is_dir() else _read_file(path)
    if use_gigatoken:
        with contextlib.suppress(InexactError):
            return GigatokenTokenizer(reference)
    return reference


def _read_directory(directory: Path) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    for name in FILE_NAMES:
        if (directory / name).exists():
            return _read_file(directory / name)
    vocabularies = [file for pattern in VOCABULARIES for file in directory.glob(pattern)]
    if not vocabularies:
        raise MaskLLMError(f"{directory}: no tokenizer.json and no tokenizer.model in this directory, and no other vocabulary")
    for file in vocabularies:
        check_not_lfs_pointer(file)
    return read_with_transformers(directory)


def _read_file(path: Path) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    check_not_lfs_pointer(path)
    files = read_tokenizer_files(path.parent) if path.name in FILE_NAMES else TokenizerFiles(path.parent)
    if path.suffix != ".model":
        return read_tokenizer_json(path, files)
    if files.found and _is_tiktoken(path):
        return read_with_transformers(path.parent)
    return SentencePieceTokenizer(path, files)


def _is_tiktoken(path: Path) -> bool:
    """Whether the file has lines of a token in base64 and its rank."""
    with path.open("rb") as stream:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", stream.readline(1000)) is not None
