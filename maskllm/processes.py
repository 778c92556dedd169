"""What the operating system knows about processes: memory held, whether one has ended, how a child ends with its parent; and the wait for
a child."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskllm.errors import StoppedError

_PR_SET_PDEATHSIG = 1  # prctl(2)


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident, in bytes."""
    try:
        # getrusage's maximum starts with that of the parent process, so Linux's own figure is better.
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def is_gone(pid: int | None) -> bool:
    """Whether a process of this machine has ended. A zombie counts as ended; None does not."""
    if pid is None:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


def end_with_parent(parent: int | None = None, number: int = signal.SIGKILL) -> None:
    """Make the kernel send this process a signal as soon as its parent ends for any reason (Linux: prctl(2)).

    Args:
        parent: the parent's process id; by default, the parent of a process of multiprocessing's.
        number: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != (parent or multiprocessing.parent_process().pid):  # the parent ended before prctl took effect
        os._exit(1)


def wait_for_child(wait: Callable[[], Any], terminate: Callable[[], None]) -> Any:
    """Call `wait`, which waits for a child process to end, and return its result.

    Raises StoppedError after SIGTERM, which is passed on by `terminate`, and KeyboardInterrupt after SIGINT, which the terminal
    sends to both processes. Both are raised only after the child has ended.
    """
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        result = wait()
    except KeyboardInterrupt:
        wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if received:
        raise StoppedError("stopped by a signal; run the same command to go on")
    return result
