"""What the system tells of processes: how much memory this one has held, whether another has ended."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """The most memory that this process has been resident with."""
    try:
        # getrusage's maximum begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def is_gone(pid: int | None) -> bool:
    """Whether a process of this machine has ended, be it that nobody has asked for its exit status yet."""
    if pid is None:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"
