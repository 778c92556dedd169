"""A job that fails says why once: the first rank that fails prints to the console, the others only to their logs.

Some imports are inside functions because they take seconds, and a single process needs none of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from maskllm.errors import MaskLLMError, as_line, first_line


def run_guarded(program: str, call: Callable[[], int | None]) -> int:
    """Call `call` and report a user's mistake as one line on standard error instead of a traceback, once in the job.

    Returns the exit status: what `call` returns (0 for None), or that of the error. A verb that runs in a process group calls this
    inside of the group.
    """
    with _interrupts_kept() as was_interrupted:
        try:
            return call() or 0
        except (Exception, KeyboardInterrupt) as error:
            found = KeyboardInterrupt() if was_interrupted() else error
            if is_alone() and not isinstance(found, MaskLLMError | OSError | KeyboardInterrupt):
                raise
            return report(program, found, sys.stderr)


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[Callable[[], bool]]:
    """A block in which no library loses an interrupt. Yields a function that tells whether one has come.

    A module that is interrupted while it is imported may raise another error instead, and Python ignores what a destructor raises; then
    the interrupt is sent again.
    """
    came = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        came.set()
        signal.default_int_handler(number, frame)

    def ignored(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            threading.Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
        else:
            hook(unraisable)

    is_default = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    hook = sys.unraisablehook
    if is_default:
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = ignored
    try:
        yield came.is_set
    finally:
        if is_default:
            # The end takes seconds, which invite another Ctrl-C, and that would only end in a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN if came.is_set() else signal.default_int_handler)
            sys.unraisablehook = hook


def is_alone() -> bool:
    """Whether this process is the only one of its job."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def is_first_failure() -> bool:
    """Whether no other rank has asked this before in this start of the job. A rank that cannot ask counts as the first."""
    if is_alone():
        return True
    from maskllm.distributed import job_store

    try:
        store = job_store("failures")
        return store is None or store.add("ranks", 1) == 1
    except RuntimeError:  # the process that kept the store has ended
        return True


def say_failure(program: str, line: str, console: TextIO, *, details: str = "", is_cause: bool = True) -> None:
    """Print `line`, after the program's name, to this rank's log and, if this is the job's first failure, to the console.

    `details` are printed before it in the log, or on the console if there is no log. With `is_cause`, torchrun's summary shows the
    line too (through the file that TORCHELASTIC_ERROR_FILE names).
    """
    line_and_program = f"{program}: error: {line}\n"
    has_log = console is not sys.stderr
    if has_log:
        with contextlib.suppress(OSError):  # the disk that holds the log may be full
            print(details + line_and_program, end="", file=sys.stderr, flush=True)
    if not is_first_failure():
        return
    print(line_and_program if has_log else details + line_and_program, end="", file=console, flush=True)
    reply = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if is_cause and reply:
        message = {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(reply).write_text(json.dumps({"message": message}), encoding="utf-8")


def report(program: str, error: BaseException, console: TextIO, where: Callable[[], str] = lambda: "") -> int:
    """Print once in the job why it fails; returns this process's exit status.

    Call it before the process group goes down: the other ranks see that as a failure of their own. An error that is neither the
    user's nor the machine's keeps its traceback, in the rank's log or, without logs, on the console. `where` tells what this rank was
    doing and which other ranks have ended.
    """
    if isinstance(error, KeyboardInterrupt):
        say_failure(program, "interrupted; run the same command again", console)
        return 130
    line = as_line(error)
    if line is not None:
        say_failure(program, line, console)
        return getattr(error, "exit_status", 1)
    from maskllm.distributed import lost_connection

    rank = os.environ.get("RANK", "0")
    first = first_line(error)
    details = "".join(traceback.format_exception(error))
    if lost_connection(error):
        time.sleep(0.5)  # a dying process closes its connections before it counts as dead, and `where` is to name it
        say_failure(
            program, f"rank {rank} lost the connection to another rank{where()} ({first})", console, details=details, is_cause=False
        )
    else:
        log = f"; its traceback is in logs/rank_{int(rank):05d}.log" if console is not sys.stderr else ""
        say_failure(program, f"rank {rank} failed{where()}: {first}{log}", console, details=details)
    return 1


@contextlib.contextmanager
def usage_said_once() -> Iterator[None]:
    """A block that parses the command line: the parser's error, or its help, is printed once in the job."""
    complaint, help_text = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(help_text):
            yield
    except SystemExit as stop:
        if os.environ.get("RANK", "0") == "0":
            print(help_text.getvalue(), end="", flush=True)
        if stop.code and is_first_failure():
            print(complaint.getvalue(), end="", file=sys.stderr, flush=True)
        raise
