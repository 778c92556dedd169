"""Opening Megatron indexed datasets, after a check of their files."""

from __future__ import annotations

import struct
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from maskllm.data.dataset_files import dataset_files
from maskllm.errors import MaskLLMError

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
"""The first bytes of an .idx file: magic, version, the tokens' DType, the number of sequences, the number of documents plus 1."""


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """Open PREFIX.bin and PREFIX.idx. Raises MaskLLMError if the files are damaged, cut off or hold no token.

    The index is checked here because upstream's reader uses assertions, and prints a second error when a reader that failed is
    deleted.
    """
    again = "make the dataset again with `maskllm preprocess`"
    tokens, idx = dataset_files(prefix)
    bin_size = tokens.stat().st_size
    if bin_size == 0:
        raise MaskLLMError(f"{tokens} is empty; {again}")
    with idx.open("rb") as file:
        header = file.read(_HEADER.size)
    magic, version, code, sequences, documents = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    if (magic, version) != (_MAGIC, 1) or code not in {dtype.value for dtype in DType}:
        raise MaskLLMError(f"{idx} is not an indexed dataset's index; {again}")
    # int32 lengths, int64 offsets into the .bin file, and int64 numbers of the documents' first sequences
    idx_size = _HEADER.size + 12 * sequences + 8 * documents
    if idx.stat().st_size < idx_size or not sequences:
        raise MaskLLMError(f"{idx} has {idx.stat().st_size} bytes, wanted {idx_size} for {sequences} sequences; {again}")
    dataset = IndexedDataset(str(prefix))
    index = dataset.index
    needed = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size
    if needed > bin_size:
        raise MaskLLMError(f"{tokens} has {bin_size} bytes, its .idx asks for {needed}; {again}")
    return dataset
