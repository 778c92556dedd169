"""Reading text files by line, plain or gzip, and corpora in C4's format: JSON lines, each an object with the text under one key."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from maskllm.errors import MaskLLMError

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line of a corpus."""

    path: Path
    number: int
    """Counted from 1."""
    data: bytes
    """The line with its line end, without the file's byte order mark."""
    position: int
    """How many bytes of the input files, as they are stored, had been read up to this line."""


class BadLineError(MaskLLMError):
    """A line that holds no document. The message names the file, the line and the reason."""


def check_inputs(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The paths as `Path`. Raises MaskLLMError if one of them is not a file, or if there are none."""
    paths = [Path(path) for path in paths]
    if not paths:
        raise MaskLLMError("no input files given")
    for path in paths:
        if not path.exists():
            raise MaskLLMError(f"{path}: no such file")
        if not path.is_file():
            found = "a directory" if path.is_dir() else "not a regular file, and may have to be read twice"
            raise MaskLLMError(f"{path}: is {found}; wanted a file")
    return paths


def read_lines(paths: Sequence[Path]) -> Iterator[Line]:
    """All lines of the files except those with only white space. Raises as `every_line` does."""
    before = 0
    for path in paths:
        yield from (line for line in every_line(path, before) if not line.data.isspace())
        before += path.stat().st_size


def every_line(path: Path, before: int = 0) -> Iterator[Line]:
    """Every line of a file. `before` is added to the lines' positions. The file's first bytes, not its name, tell gzip from text.

    Raises MaskLLMError if a gzip stream is damaged or ends early.
    """
    with path.open("rb") as stored:
        compressed = stored.peek(2)[:2] == _GZIP_MAGIC
        stream = gzip.GzipFile(fileobj=stored) if compressed else stored
        number = 0
        try:
            for number, data in enumerate(stream, start=1):
                if number == 1:
                    data = data.removeprefix(_BYTE_ORDER_MARK)
                yield Line(path, number, data, before + stored.tell())
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise MaskLLMError(
                f"{path}: the gzip stream is damaged or cut off after line {number} ({error}); fetch the file again"
            ) from error


def document(line: Line, key: str) -> str:
    """The text of a line. Raises BadLineError if the line is not a JSON object with a string of valid Unicode under `key`."""

    def bad(reason: str) -> BadLineError:
        return BadLineError(f"{line.path}:{line.number}: {reason}")

    try:
        value = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise bad(f"not UTF-8: byte 0x{line.data[error.start]:02x} at offset {error.start}") from error
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits raise a plain ValueError
        raise bad(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise bad(f"a JSON {_kind(value)}, wanted an object with the key {key!r}")
    if key not in value:
        raise bad(f"no key {key!r} (it has {', '.join(map(repr, list(value)[:8])) or 'none'})")
    text = value[key]
    if not isinstance(text, str):
        raise bad(f"{key!r} is a JSON {_kind(text)}, wanted a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise bad(f"{key!r} holds half of a surrogate pair, \\u{ord(text[error.start]):04x}") from error
    return text


def _kind(value: object) -> str:
    """JSON's name for the type of `value`."""
    return {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
