"""Opening Megatron indexed datasets, after a check of their files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from maskllm.data.dataset_files import dataset_files
from maskllm.errors import MaskLLMError
from maskllm.files import check_not_lfs_pointer

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
"""The first bytes of an .idx file: magic, version, the tokens' DType, the number of sequences, the number of documents plus 1."""
_INTEGERS = {kind.value: np.dtype(kind.name) for kind in DType if np.issubdtype(kind.name, np.integer)}
"""The codes of the types that token ids can have."""
_AT_ONCE = 1 << 20
"""How many entries of an index are checked at a time. This bounds the memory of the check."""
_AGAIN = "make the dataset again with `maskllm preprocess`"


def open_indexed(prefix: str | Path) -> IndexedDataset:
    """Open PREFIX.bin and PREFIX.idx after a check of the whole index, which takes about three seconds for 10^8 sequences.

    After its header, an index has each sequence's length in tokens (int32), each sequence's offset in the .bin file in bytes (int64),
    and each document's first sequence (int64), followed by the number of sequences. An int8 mode of each sequence may follow.

    Raises MaskLLMError if the files are damaged, cut off or git-lfs pointers, do not fit each other, or hold no token. Upstream's
    reader has assertions for some of this, and otherwise reads wrong tokens.
    """
    tokens, idx = dataset_files(prefix)
    for path in (tokens, idx):
        check_not_lfs_pointer(path)
    bin_size = tokens.stat().st_size
    if bin_size == 0:
        raise MaskLLMError(f"{tokens} is empty; {_AGAIN}")
    with idx.open("rb") as file:
        header = file.read(_HEADER.size)
    magic, version, code, sequences, documents = _HEADER.unpack(header.ljust(_HEADER.size, b"\0"))
    if (magic, version) != (_MAGIC, 1) or code not in _INTEGERS:
        raise MaskLLMError(f"{idx} is not an indexed dataset's index; {_AGAIN}")
    idx_size, wanted = idx.stat().st_size, _HEADER.size + 12 * sequences + 8 * documents
    if idx_size not in (wanted, wanted + sequences) or not sequences or not documents:
        raise MaskLLMError(f"{idx} has {idx_size} bytes, wanted {wanted} for {sequences} sequences; {_AGAIN}")
    lengths = np.memmap(idx, np.int32, "r", _HEADER.size, sequences)
    offsets = np.memmap(idx, np.int64, "r", _HEADER.size + lengths.nbytes, sequences)
    firsts = np.memmap(idx, np.int64, "r", _HEADER.size + lengths.nbytes + offsets.nbytes, documents)
    needed = _check_sequences(idx, lengths, offsets, _INTEGERS[code].itemsize)
    _check_documents(idx, firsts, sequences)
    if needed != bin_size:
        raise MaskLLMError(f"{tokens} has {bin_size} bytes, its .idx asks for {needed}; {_AGAIN}")
    return IndexedDataset(str(prefix))


def _check_sequences(idx: Path, lengths: np.ndarray, offsets: np.ndarray, token_size: int) -> int:
    """Raise MaskLLMError if a length is negative or a sequence does not begin at the end of the one before it.

    Returns the end of the last sequence in bytes.
    """
    end = 0
    for first in range(0, len(lengths), _AT_ONCE):
        some = lengths[first : first + _AT_ONCE]
        if some.min() < 0:
            number = int(np.argmax(some < 0))
            raise MaskLLMError(f"{idx}: sequence {first + number} has a length of {some[number]}, wanted 0 or more; {_AGAIN}")
        ends = end + np.cumsum(some, dtype=np.int64) * token_size
        starts = np.concatenate(([end], ends[:-1]))
        found = offsets[first : first + _AT_ONCE]
        if (found != starts).any():
            number = int(np.argmax(found != starts))
            raise MaskLLMError(
                f"{idx}: sequence {first + number} begins at byte {found[number]}, wanted {starts[number]}, the end of the "
                f"sequences before it; {_AGAIN}"
            )
        end = int(ends[-1])
    return end


def _check_documents(idx: Path, firsts: np.ndarray, sequences: int) -> None:
    """Raise MaskLLMError if the documents are not all sequences in their order."""
    if firsts[0] != 0 or firsts[-1] != sequences:
        raise MaskLLMError(f"{idx}: the documents are sequences {firsts[0]} to {firsts[-1]}, wanted 0 to {sequences}; {_AGAIN}")
    for first in range(0, len(firsts), _AT_ONCE):
        some = firsts[first : first + _AT_ONCE + 1]
        backwards = some[1:] < some[:-1]
        if backwards.any():
            number = int(np.argmax(backwards))
            raise MaskLLMError(
                f"{idx}: document {first + number + 1} begins at sequence {some[number + 1]}, wanted {some[number]} or more, the "
                f"begin of the document before it; {_AGAIN}"
            )
