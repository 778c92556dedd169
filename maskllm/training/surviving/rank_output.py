"""Output of a rank: the run's progress and its first failure go to the console, everything else to one log file per rank."""

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
    """The original standard error. If the terminal is closed or nobody reads the pipe, the output is lost and the run goes on."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


@contextlib.contextmanager
def rank_output(save: str | None, rank: int) -> Iterator[TextIO]:
    """Redirect the output of this process and its children to SAVE/logs/rank_00000.log (for rank 0). Yields the console.

    The console is the original standard error. The file descriptors are redirected, so the log also gets the output of C++
    libraries and of a crashing interpreter. If `save` is None, nothing is redirected. A restarted job appends to the log.
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
        with contextlib.suppress(OSError):  # the disk is full or the terminal is closed
            sys.stdout.flush()
            sys.stderr.flush()
            console.close()
        for number, saved in before.items():
            os.dup2(saved, number)
            os.close(saved)
