"""Calibration samples: windows of tokens from an indexed dataset or from JSON lines.

As in the papers (Wanda, section 4; SparseGPT, section 4), windows are random parts of documents that are longer than a window. For
short documents, `pack` joins all documents into one stream and cuts that into windows.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from maskllm.data.dataset_files import SUFFIXES, dataset_files
from maskllm.data.json_lines import document
from maskllm.data.text_files import check_inputs, read_lines
from maskllm.data.tokenizer import load_tokenizer
from maskllm.data.tokens import Tokenizer
from maskllm.distributed import is_first_rank
from maskllm.dtypes import dtype_name
from maskllm.errors import MaskLLMError
from maskllm.families.model_config import check_context, check_vocabulary


@dataclass(frozen=True)
class Calibration:
    """The calibration tokens, which `sample_windows` draws from `data`, and the dtype that the layers compute in."""

    data: str
    """The prefix of an indexed dataset, or a JSON-lines file."""
    samples: int = 128
    seq_length: int = 2048
    seed: int = 1234
    pack: bool = False
    params_dtype: torch.dtype | None = torch.bfloat16
    """None: for `maskllm compress`, the checkpoint's dtype as `maskllm.huggingface.loading.compute_dtype` has it."""

    def tokens(self, tokenizer: str | Path, *, context: int | None, vocabulary: int) -> torch.Tensor:
        """Draw the tokens, int64 [samples, seq_length].

        Args:
            tokenizer: the directory of the model's tokenizer, for JSON lines.
            context: the positions that the model has; None for any number.
            vocabulary: the tokens that its embedding has.

        Raises MaskLLMError if the data cannot be read or do not fit the model.
        """
        if context is not None:
            check_context(self.seq_length, context)
        documents = open_documents(self.data, tokenizer, append_eod=self.pack)
        tokens = sample_windows(documents, self.samples, self.seq_length, seed=self.seed, pack=self.pack)
        check_vocabulary(tokens, vocabulary, self.data)
        return tokens

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "params_dtype": dtype_name(self.params_dtype)}


def is_indexed(path: str | os.PathLike) -> bool:
    """Whether `path` is the prefix of an indexed dataset, which only Megatron Core reads."""
    return all(file.exists() for file in dataset_files(path))


class IndexedDocuments(Sequence[np.ndarray]):
    """The documents of a Megatron indexed dataset, each int64 [tokens]."""

    def __init__(self, prefix: str | Path) -> None:
        """Open PREFIX.bin and PREFIX.idx. Raises MaskLLMError if they are damaged, truncated or empty."""
        from maskllm.data.indexed import open_indexed  # needs Megatron Core, and JSON lines do not

        self._dataset = open_indexed(prefix)
        self._bounds = self._dataset.document_indices

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        sequences = [self._dataset[i] for i in range(self._bounds[index], self._bounds[index + 1])]
        return np.concatenate(sequences or [np.empty(0)]).astype(np.int64)


class JsonLinesDocuments(Sequence[np.ndarray]):
    """The `text` fields of a JSON-lines file (plain, gzip or Zstandard), each int64 [tokens]. A document is tokenized when it is read."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer, *, append_eod: bool) -> None:
        """Read the file into memory. `append_eod` adds the tokenizer's end-of-sequence token, if it has one, to each document.

        Raises MaskLLMError if the file cannot be read.
        """
        self._lines = list(read_lines(check_inputs([path])))
        self._tokenizer = tokenizer
        self._end = [] if tokenizer.eod is None or not append_eod else [tokenizer.eod]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> np.ndarray:
        tokens = self._tokenizer.encode(document(self._lines[index], "text"))
        return np.concatenate([tokens, self._end]).astype(np.int64)


def open_documents(path: str | Path, tokenizer: str | Path, *, append_eod: bool = False) -> Sequence[np.ndarray]:
    """The documents at `path`: the prefix of an indexed dataset, or a JSON-lines file, which the tokenizer at `tokenizer`
    tokenizes.

    Raises MaskLLMError if `path` is neither, or if the tokenizer cannot be read.
    """
    if is_indexed(path):
        return IndexedDocuments(path)
    if Path(path).suffix in SUFFIXES and is_indexed(prefix := str(Path(path).with_suffix(""))):
        raise MaskLLMError(f"{path}: is a file of an indexed dataset; wanted its prefix, {prefix}")
    if Path(path).is_file():
        # Only a few documents are tokenized, so gigatoken's start-up is not worth its speed.
        return JsonLinesDocuments(path, load_tokenizer(tokenizer, use_gigatoken=False), append_eod=append_eod)
    raise MaskLLMError(
        f"{path}: wanted an indexed dataset's prefix ({path}{SUFFIXES[0]} and {SUFFIXES[1]} are not there) or a JSON-lines file"
    )


def sample_windows(
    documents: Sequence[np.ndarray], samples: int, seq_length: int, *, seed: int, pack: bool = False
) -> torch.Tensor:
    """Draw `samples` windows of `seq_length` tokens, int64 [samples, seq_length]. The same arguments give the same windows.

    Documents are drawn in random order. No document is drawn twice before all have been drawn once. The window starts at a random
    place in a document longer than `seq_length`; other documents are skipped. With `pack`, the drawn documents form one stream that
    is cut into windows. Raises MaskLLMError if no document is long enough, or with `pack` if there are no tokens.
    """
    generator = np.random.default_rng(seed)
    windows = _packed(documents, seq_length, generator) if pack else _within(documents, seq_length, generator)
    silent = None if is_first_rank() else True
    progress = tqdm(windows, total=samples, desc="calibration data", unit="sample", disable=silent, leave=False)
    with progress:
        found = list(itertools.islice(progress, samples))
    if not found:
        if pack:
            raise MaskLLMError("the calibration data has no tokens")
        raise MaskLLMError(
            f"none of the {len(documents)} calibration documents is longer than {seq_length} tokens; use a smaller --seq-length, or "
            "--pack to join documents"
        )
    return torch.from_numpy(np.stack(found))


def _within(documents: Sequence[np.ndarray], seq_length: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless windows, each within a document longer than `seq_length`. Ends only if there is no such document."""
    candidates = np.arange(len(documents))
    while len(candidates):
        long_enough = []
        for index in generator.permutation(candidates):
            tokens = documents[index]
            if len(tokens) > seq_length:
                long_enough.append(index)
                start = generator.integers(len(tokens) - seq_length)
                yield tokens[start : start + seq_length]
        candidates = np.asarray(long_enough)


def _packed(documents: Sequence[np.ndarray], seq_length: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless consecutive windows of the documents in random order. Ends only if all documents are empty."""
    pending: list[np.ndarray] = []
    length = 0
    while True:
        seen = 0
        for index in generator.permutation(len(documents)):
            tokens = documents[index]
            seen += len(tokens)
            pending.append(tokens)
            length += len(tokens)
            if length >= seq_length:
                stream = np.concatenate(pending)
                whole = length // seq_length * seq_length
                yield from stream[:whole].reshape(-1, seq_length)
                pending, length = [stream[whole:]], length - whole
        if not seen:
            return
