"""Where a rank's words go: the console gets the run's progress and its first failure, a file of its own everything else."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

LOGS = "logs"


class _Console(io.TextIOWrapper):
    """Standard error as it was. A run outlives it: what it prints to a closed terminal, or a pipe that nobody reads, is lost."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def rank_output(save: str | None, rank: int) -> Iterator[TextIO]:
    """Send what this process and its children print from here on to SAVE/logs/rank_00000.log; yields the console instead.

    The console is what standard error was. File descriptors are redirected, so that the words of C++ libraries and of a dying interpreter
    go with the rest. Without `save` nothing is redirected. A restarted job's words follow those of the job before it.
    """
    if save is None:
        yield sys.stderr
        return
    path = Path(save) / LOGS / f"rank_{rank:05d}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    before = {number: os.dup(number) for number in (1, 2)}
    with path.open("ab", buffering=0) as log:
        for number in before:
            os.dup2(log.fileno(), number)
    console = _Console(os.fdopen(os.dup(before[2]), "wb"), encoding="utf-8", errors="backslashreplace", line_buffering=True)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"--- rank {rank}, process {os.getpid()} on {socket.gethostname()}, {started}", flush=True)
    try:
        yield console
    finally:
        with contextlib.suppress(OSError):  # a full disk, or a terminal that has been closed
            sys.stdout.flush()
            sys.stderr.flush()
            console.close()
        for number, saved in before.items():
            os.dup2(saved, number)
            os.close(saved)
