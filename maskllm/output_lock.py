"""Lock of an output directory: only one job at a time writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from maskllm.errors import MaskLLMError
from maskllm.files import NO_LOCKS
from maskllm.processes import is_gone

LOCK = ".lock"
_PATIENCE_SECONDS = 180


@contextlib.contextmanager
def output_lock(directory: Path, option: str) -> Iterator[None]:
    """Lock `directory` for one job, and create it if it is missing. The job's first rank must call this before it writes there.

    Messages call the directory the value of `option`.

    The kernel holds the lock (flock). It releases the lock when the process ends, for whatever reason, together with the processes
    that write its checkpoints in the background. Those end with it. This function waits up to three minutes in two cases:

    * The holder on this machine has died, but its background processes still hold the lock.
    * Another machine holds the lock for this same job, and torchrun has restarted the job.

    If the file system has no locks, this function prints a warning and goes on.

    Raises MaskLLMError, with the holder's host and process ID, if another job holds the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+", encoding="utf-8") as file:
        # On a shared file system, a dead machine keeps its lock until its lease expires.
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        job = os.environ.get("TORCHELASTIC_RUN_ID")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                host, pid, holder = _holder(directory / LOCK)
                going = not is_gone(pid) if host == socket.gethostname() else not (restarted and holder == job)
                if time.monotonic() > deadline or going:
                    raise MaskLLMError(
                        f"{option} {directory}: process {pid} on {host} is writing there; wait for it, stop it, or name another {option}"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"{option} {directory}: its file system has no locks ({error.strerror}); a second job would go unnoticed",
                    file=sys.stderr,
                )
                break
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job}) + "\n")
        file.flush()
        yield


def _holder(path: Path) -> tuple[str, int | None, str | None]:
    """Return the holder's host, process ID and torchrun job ID."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values["host"], values["pid"], values["job"]
    except (ValueError, KeyError, TypeError):  # the holder has not written them yet
        return "some host", None, None
