"""A job that fails says why once: the rank that fails first takes the word in the job's store, the others write to their own logs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from maskllm.distributed import job_store, lost_connection
from maskllm.errors import as_line, first_line

PROGRAM = "maskllm.train"


def is_first_failure() -> bool:
    """Take the word for this attempt at the job; False where another rank has had it. A rank that cannot ask has it."""
    try:
        store = job_store("failures")
        return store is None or store.add("ranks", 1) == 1
    except RuntimeError:  # the store has gone with the process that kept it
        return True


def say_failure(line: str, console: TextIO, *, details: str = "", is_cause: bool = True) -> None:
    """Print `line` on the console if this is the job's first failure; it and `details` go to this rank's log in any case.

    With `is_cause` torchrun's summary shows the line too (in the file that TORCHELASTIC_ERROR_FILE names).
    """
    line_and_program = f"{PROGRAM}: error: {line}\n"
    has_log = console is not sys.stderr
    if has_log:
        with contextlib.suppress(OSError):  # the log lies on the disk that may be full
            print(details + line_and_program, end="", file=sys.stderr, flush=True)
    if not is_first_failure():
        return
    print(line_and_program if has_log else details + line_and_program, end="", file=console, flush=True)
    reply = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if is_cause and reply:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(reply).write_text(json.dumps({"message": message}), encoding="utf-8")


def report(error: BaseException, console: TextIO, where: Callable[[], str] = lambda: "") -> int:
    """Say once in the job why it fails; returns this process's exit status.

    An error that is neither the user's nor the machine's keeps its traceback: in the rank's log, or on the console where there are none.
    `where` tells what this rank was doing, and what has become of the others.
    """
    if isinstance(error, KeyboardInterrupt):
        say_failure("interrupted; run the same command again to go on", console)
        return 130
    line = as_line(error)
    if line is not None:
        say_failure(line, console)
        return getattr(error, "exit_status", 1)
    rank = os.environ.get("RANK", "0")
    first = first_line(error)
    details = "".join(traceback.format_exception(error))
    if lost_connection(error):
        say_failure(f"rank {rank} lost the connection to another rank{where()} ({first})", console, details=details, is_cause=False)
    else:
        log = f"; its traceback is in logs/rank_{int(rank):05d}.log" if console is not sys.stderr else ""
        say_failure(f"rank {rank} failed{where()}: {first}{log}", console, details=details)
    return 1
