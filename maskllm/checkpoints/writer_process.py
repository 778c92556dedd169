"""What runs in the process that Megatron starts to write a rank's files: the writing, then the files' checksums."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from maskllm.checkpoints.checksums import FileRecord
from maskllm.files import read_json_object, write_json
from maskllm.processes import end_with_parent


def write_and_record(write: Callable[..., None], directory: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Call Megatron's `write(*args, **kwargs)`, then store the checksums of its files in `directory` for `collect_records`.

    The process ends when its rank ends, because then nobody can publish what it writes, and when a process that it has started is
    killed. Megatron keeps a failure of `write` for its own later check. A file that cannot be read here gets no record;
    `write_manifest` reads it.
    """
    end_with_parent()
    signal.signal(signal.SIGCHLD, _end_with_killed_child)
    write(*args, **kwargs)
    buckets = args[1]
    with contextlib.suppress(OSError):
        records = {name: dataclasses.asdict(FileRecord.of(Path(path))) for path, name, _ in buckets}
        write_json(directory / f".records_{rank:05d}.json", records)


def collect_records(directory: Path) -> dict[str, FileRecord]:
    """The checksums that all ranks' writers have stored in `directory`, by file name. Removes the files that held them."""
    records: dict[str, FileRecord] = {}
    for part in directory.glob(".records_*.json"):
        records |= {name: FileRecord(**record) for name, record in read_json_object(part).items()}
        part.unlink()
    return records


def _end_with_killed_child(*_: Any) -> None:
    """A handler of SIGCHLD: end this process if a signal has killed one of its children (usually because memory ran out).

    Megatron's writer starts processes and, up to version 0.18, waits forever for one that has been killed.
    """
    for child in psutil.Process().children():
        with contextlib.suppress(ChildProcessError):
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None and ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                os._exit(1)
