"""Reading text files by line: plain, gzip or Zstandard.

A file's first bytes, not its name, tell what it is.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from maskllm.errors import MaskLLMError
from maskllm.files import check_not_lfs_pointer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + i]) + b"\x2a\x4d\x18" for i in range(16)))
"""The first bytes of a frame, and of a frame to skip, which some writers put first (RFC 8878, section 3.1)."""
_ZSTD_OPTIONS = {zstd.DecompressionParameter.window_log_max: 31}
"""Large corpora are written with `zstd --long=31`. The reader's memory grows to 2 GB for such a file only."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_DATASETS = "convert it in Python: datasets.load_dataset('{}', data_files=FILE, split='train').to_json('data.jsonl')"
_UTF16 = "convert it: iconv -f UTF-16 -t UTF-8"
_OTHER_FORMATS = (
    # offset, the bytes there, what the file is, what to do
    (4, b"1AY&SY", "a bzip2 file", "unpack it: bunzip2"),
    (0, b"\xfd7zXZ\0", "an xz file", "unpack it: unxz"),
    (0, b"\x04\x22\x4d\x18", "an lz4 file", "unpack it: unlz4"),
    (0, b"PK\3\4", "a zip archive", "unpack it: unzip"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: 7z x"),
    (257, b"ustar\0", "a tar archive", "unpack it: tar -xf"),
    (257, b"ustar  \0", "a tar archive", "unpack it: tar -xf"),
    (0, b"PAR1\x15", "a Parquet file", _DATASETS.format("parquet")),
    (0, b"ARROW1\0\0", "an Arrow file", _DATASETS.format("arrow")),
    (0, b"\xff\xff\xff\xff", "an Arrow stream", _DATASETS.format("arrow")),
    (0, b"\xff\xfe", "UTF-16 text", _UTF16),
    (0, b"\xfe\xff", "UTF-16 text", _UTF16),
    *((0, magic, "compressed twice", "unpack it once") for magic in (_GZIP_MAGIC, *_ZSTD_MAGICS)),
)
"""Forms in which corpora come and which are not read."""
_HEAD = 265
"""How many of a text's first bytes tell whether it is of `_OTHER_FORMATS`."""
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError)
"""What the readers of compressed streams raise."""


class Line(NamedTuple):
    """One line of a file."""

    path: Path
    number: int
    """Counted from 1."""
    data: bytes
    """The line with its line end, without the file's byte order mark."""
    position: int
    """How many bytes of the input files, as they are stored, had been read up to this line."""


def check_inputs(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The paths as `Path`. Raises MaskLLMError if there are none, or if one is not a file, or not text (plain, gzip or Zstandard)."""
    paths = [Path(path) for path in paths]
    if not paths:
        raise MaskLLMError("no input files given")
    for path in paths:
        if not path.exists():
            raise MaskLLMError(f"{path}: no such file")
        if not path.is_file():
            found = "a directory" if path.is_dir() else "not a regular file, and may have to be read twice"
            raise MaskLLMError(f"{path}: is {found}; wanted a file")
        check_not_lfs_pointer(path)
        _check_is_text(path)
    return paths


def _check_is_text(path: Path) -> None:
    """Raise MaskLLMError, which says what the file is, if it is of a form that is known and not read."""
    head = b""
    with path.open("rb") as stored, contextlib.suppress(*_DAMAGED):  # `every_line` reports a damaged stream
        head = _decompressed(stored)[0].peek(_HEAD)
    for offset, magic, found, advice in _OTHER_FORMATS:
        if head.startswith(magic, offset):
            raise MaskLLMError(f"{path}: is {found}; wanted text (plain, gzip or .zst); {advice}")


def _decompressed(stored: io.BufferedReader) -> tuple[io.BufferedReader | gzip.GzipFile | zstd.ZstdFile, str]:
    """The text of an open file as a stream, and the name of its compression."""
    start = stored.peek(4)
    if start.startswith(_GZIP_MAGIC):
        return gzip.GzipFile(fileobj=stored), "gzip"
    if start.startswith(_ZSTD_MAGICS):
        return zstd.ZstdFile(stored, options=_ZSTD_OPTIONS), "Zstandard"
    return stored, "plain"


def read_lines(paths: Sequence[Path]) -> Iterator[Line]:
    """All lines of the files except those with only white space. Raises as `every_line` does."""
    before = 0
    for path in paths:
        yield from (line for line in every_line(path, before) if not line.data.isspace())
        before += path.stat().st_size


def every_line(path: Path, before: int = 0) -> Iterator[Line]:
    """Every line of a file. `before` is added to the lines' positions.

    Raises MaskLLMError if a compressed stream is damaged or ends early.
    """
    with path.open("rb") as stored:
        stream, compression = _decompressed(stored)
        number = 0
        try:
            for number, data in enumerate(stream, start=1):
                if number == 1:
                    data = data.removeprefix(_BYTE_ORDER_MARK)
                yield Line(path, number, data, before + stored.tell())
        except _DAMAGED as error:
            raise MaskLLMError(
                f"{path}: the {compression} stream is damaged or cut off after line {number} ({error}); fetch the file again"
            ) from error
