"""Outputs that appear complete or not at all: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskllm.errors import MaskLLMError


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(error: OSError, path: Path) -> None:
    """Let an error that only writing causes, and that names no file, name the output."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
        error.filename = str(path)


def real_file(path: str | os.PathLike) -> Path:
    """Where an output file `path` goes: where it is a link, what the link points to is written and the link stays.

    Raises MaskLLMError where something other than a regular file is there: a rename would do away with a pipe or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise MaskLLMError(f"{path}: is {'a directory' if path.is_dir() else 'no regular file'}, wanted a file to write")
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[None]:
    """Make the directory `path` for the block; where that raises, remove the directories that were made."""
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for directory in made:
            with contextlib.suppress(OSError):  # it may hold what others have written meanwhile
                directory.rmdir()
        raise


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it there, on disk, when the block ends without an exception.

    On an exception the temporary file is removed and `path` is left as it was. What a killed process left is overwritten. Raises as
    `real_file` does.
    """
    path = real_file(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with _directory(path.parent):
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        except OSError as error:
            _name(error, path)
            raise
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; every file in it is synced and it takes `path`'s place when the block ends.

    An existing directory at `path` is replaced, or the one that a link there points to. On an exception the temporary directory is
    removed and `path` is left as it was.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    with _directory(path.parent):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            publish_directory(temporary, path)
        except OSError as error:
            _name(error, path)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def publish_directory(temporary: Path, path: Path) -> None:
    """Sync every file under `temporary` and rename it to `path`, replacing a directory already there."""
    for entry in sorted(temporary.rglob("*")):
        _fsync(entry)
    _fsync(temporary)
    retired = path.with_name(f".{path.name}.old")
    if path.exists():
        shutil.rmtree(retired, ignore_errors=True)  # of a replacement that was killed
        os.replace(path, retired)
    os.replace(temporary, path)
    _fsync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block that writes a safetensors file for `path`: the library's own error becomes a MaskLLMError that names it."""
    from safetensors import SafetensorError  # here: `maskllm doctor` tells when it is missing

    try:
        yield
    except SafetensorError as error:  # a full disk, most often
        raise MaskLLMError(f"{path}: cannot be written: {error}") from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8 to `path`, complete or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON to `path`, complete or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises MaskLLMError naming file and line where it holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MaskLLMError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise MaskLLMError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise MaskLLMError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, or thousands of nested brackets
        raise MaskLLMError(f"{path}: not JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise MaskLLMError(f"{path}: wanted a JSON object, found {type(values).__name__}")
    return values
