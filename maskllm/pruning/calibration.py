"""Calibration samples: windows of tokens from an indexed dataset or from JSON lines.

As in the papers (Wanda, section 4; SparseGPT, section 4): random windows from documents longer than a window. Where documents are
short, `pack` makes one stream of them and cuts it into windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tqdm import tqdm

from maskllm.data.dataset_files import SUFFIXES
from maskllm.data.indexed import open_indexed
from maskllm.data.json_lines import check_inputs, document, read_lines
from maskllm.data.tokenizer import Tokenizer, load_tokenizer
from maskllm.distributed import is_first_rank
from maskllm.errors import MaskLLMError


class IndexedDocuments(Sequence[np.ndarray]):
    """The documents of a Megatron indexed dataset, int64 [tokens] each."""

    def __init__(self, prefix: str | Path) -> None:
        """Open PREFIX.bin and PREFIX.idx. Raises MaskLLMError where they are damaged, cut off or empty."""
        self._dataset = open_indexed(prefix)
        self._bounds = self._dataset.document_indices

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        sequences = [self._dataset[i] for i in range(self._bounds[index], self._bounds[index + 1])]
        return np.concatenate(sequences or [np.empty(0)]).astype(np.int64)


class JsonLinesDocuments(Sequence[np.ndarray]):
    """The `text` fields of a JSON-lines file, plain or gzip, tokenized when asked for, int64 [tokens] each."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer, *, append_eod: bool) -> None:
        """Read the file into memory. `append_eod` ends documents with the tokenizer's end-of-sequence token, where it has one.

        Raises MaskLLMError where the file cannot be read.
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
    """The documents at `path`: an indexed dataset's prefix, or a JSON-lines file, which the tokenizer in `tokenizer` reads.

    Raises MaskLLMError where it is neither, or the tokenizer cannot be read.
    """
    if IndexedDataset.exists(str(path)):
        return IndexedDocuments(path)
    if Path(path).suffix in SUFFIXES and IndexedDataset.exists(prefix := str(Path(path).with_suffix(""))):
        raise MaskLLMError(f"{path}: is a file of an indexed dataset; wanted its prefix, {prefix}")
    if Path(path).is_file():
        # Few documents are read: the tokenizer's own library will do.
        return JsonLinesDocuments(path, load_tokenizer(tokenizer, use_gigatoken=False), append_eod=append_eod)
    raise MaskLLMError(
        f"{path}: wanted an indexed dataset's prefix ({path}{SUFFIXES[0]} and {SUFFIXES[1]} are not there) or a JSON-lines file"
    )


def sample_windows(
    documents: Sequence[np.ndarray], samples: int, seq_length: int, *, seed: int, pack: bool = False
) -> torch.Tensor:
    """`samples` windows of `seq_length` tokens, int64 [samples, seq_length], the same for the same arguments.

    Documents are drawn in random order, each again only when all have been, and the window of a document longer than `seq_length`
    starts at random; shorter ones are passed over. With `pack` the drawn documents follow each other in one stream that is cut into
    windows. Raises MaskLLMError where no document is long enough, or with `pack` where there is no token at all.
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
    """Windows of documents longer than `seq_length`, without end unless there are none."""
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
    """Consecutive windows of all documents in random order, without end unless they are empty."""
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
