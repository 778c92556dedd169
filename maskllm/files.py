"""Files: outputs that appear complete or not at all (write a temporary file, fsync, rename), JSON objects, git-lfs pointers.

The permissions of outputs follow the umask. The names of temporary files and directories start with a dot and end with `.tmp`;
`.old` is a directory that is being replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskllm.errors import MaskLLMError

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What flock raises on a file system without locks, for example Lustre without `-o flock`."""


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _add_path(error: OSError, path: Path) -> None:
    """Add the output path to a disk-full error that carries no file name."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
        error.filename = str(path)


def real_file(path: str | os.PathLike) -> Path:
    """The file that an output to `path` replaces: if `path` is a link, the link stays and its target is written.

    Raises MaskLLMError if something other than a regular file is there. A rename would destroy a pipe or a device.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise MaskLLMError(f"{path}: is {'a directory' if path.is_dir() else 'not a regular file'}, wanted a file to write")
    return Path(os.path.realpath(path))


def _make_readable(path: Path, mode: int) -> None:
    """Give the file `path` the permissions in `mode`. Some libraries, such as safetensors, make files that only their owner can read."""
    if stat.S_IMODE(path.stat().st_mode) != mode & 0o666:
        path.chmod(mode & 0o666)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[None]:
    """A block that writes into the directory `path`. Makes it, and removes the directories that it made if the block raises."""
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for directory in made:
            with contextlib.suppress(OSError):  # others may have written into it
                directory.rmdir()
        raise


def empty_output(output: str | os.PathLike) -> Path:
    """The directory of --output, which a verb is going to write.

    Raises MaskLLMError unless it is missing or an empty directory, and if it is a mount point, which no rename can replace.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MaskLLMError(f"--output {output} exists and is not an empty directory; remove it or name another")
    if output.is_mount():
        raise MaskLLMError(f"--output {output} is a mount point; name a directory in it")
    return output


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """A block that writes the file `path`: yields a temporary path beside it, to be written and closed.

    When the block ends, the temporary file is synced to disk and renamed to `path`. If it raises, the temporary file is removed and
    `path` stays as it was. A temporary file of a killed process is overwritten. Raises as `real_file` does.
    """
    path = real_file(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with _directory(path.parent):
        try:
            temporary.unlink(missing_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            _make_readable(temporary, mode)
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        except OSError as error:
            _add_path(error, path)
            raise
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike, *, replace: bool = True) -> Iterator[Path]:
    """A block that writes the directory `path`: yields a temporary directory beside it.

    When the block ends, all files are synced to disk and the directory is renamed to `path`. It replaces a directory at `path`, or
    the one that a link at `path` points to, and takes over its permissions. If the block raises, the temporary directory is removed and
    `path` stays as it was.

    Raises MaskLLMError if another process is writing `path`, and, unless `replace`, as `empty_output` does.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    with _directory(path.parent), _claimed(temporary, path):
        try:
            if not replace:
                empty_output(path)
            yield temporary
            publish_directory(temporary, path)
        except OSError as error:
            _add_path(error, path)
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _claimed(temporary: Path, path: Path) -> Iterator[None]:
    """A new directory `temporary`, which this process has locked. Removes that of a killed process.

    Raises MaskLLMError if another process has it.
    """
    with contextlib.ExitStack() as stack:
        try:
            temporary.mkdir()
        except FileExistsError:
            _lock(temporary, path, stack)  # of a process that was killed; of another, this fails
            shutil.rmtree(temporary)
            temporary.mkdir()
        _lock(temporary, path, stack)
        yield


def _lock(directory: Path, path: Path, stack: contextlib.ExitStack) -> None:
    """Lock `directory` until `stack` closes. Raises MaskLLMError, which names `path`, if another process has locked or removed it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = os.path.samestat(os.fstat(descriptor), directory.stat())
    except (BlockingIOError, FileNotFoundError):
        same = False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return
    if not same:
        raise MaskLLMError(f"{path}: another process is writing it; wait for it, stop it, or name another place")


def publish_directory(temporary: Path, path: Path) -> None:
    """Sync every file under `temporary` and rename it to `path`, replacing a directory already there, whose permissions it takes over.

    The files get the permissions that the umask gives to `temporary`, which is new.
    """
    mode = temporary.stat().st_mode
    for entry in sorted(temporary.rglob("*")):
        if entry.is_file():
            _make_readable(entry, mode)
        _fsync(entry)
    _fsync(temporary)
    retired = path.with_name(f".{path.name}.old")
    if path.exists():
        temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        shutil.rmtree(retired, ignore_errors=True)  # from a process that was killed while it replaced the directory
        os.replace(path, retired)
    os.replace(temporary, path)
    _fsync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def explain_safetensors_errors(path: Path) -> Iterator[None]:
    """A block that writes a safetensors file for `path`: a SafetensorError becomes a MaskLLMError that names the file."""
    from safetensors import SafetensorError  # imported here so that `maskllm doctor` runs, and says so, if it is missing

    try:
        yield
    except SafetensorError as error:  # usually because the disk is full
        raise MaskLLMError(f"{path}: cannot be written: {error}") from None


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8 to `path`, complete or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON to `path`, complete or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
"""The start of a pointer file, as the specification of git-lfs has it."""


def check_not_lfs_pointer(path: str | os.PathLike) -> None:
    """Raise MaskLLMError if `path` is a git-lfs pointer: the small text that a clone without git-lfs has in place of a large file.

    Something other than a regular file passes, because reading a pipe would take its bytes. Raises OSError if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise MaskLLMError(
            f"{path}: is a git-lfs pointer, not the file itself; run `git lfs pull` in the cloned repository to download the file"
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises MaskLLMError naming the file, and the line of a syntax error, if it is anything else."""
    try:
        check_not_lfs_pointer(path)
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MaskLLMError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise MaskLLMError(f"{path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise MaskLLMError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits, or thousands of nested brackets
        raise MaskLLMError(f"{path}: not JSON that can be read: {error}") from None
    if not isinstance(values, dict):
        raise MaskLLMError(f"{path}: wanted a JSON object, found {type(values).__name__}")
    return values
