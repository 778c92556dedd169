"""One job writes to an output directory at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from maskllm.errors import MaskLLMError
from maskllm.processes import is_gone

LOCK = ".lock"
_PATIENCE_SECONDS = 180
_CANNOT_LOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre without -o flock, for one


@contextlib.contextmanager
def output_lock(directory: Path) -> Iterator[None]:
    """Hold `directory`, made if it is not there, for one job: called by its first rank, before anything is written there.

    The lock is the kernel's (flock): it goes with the process that holds it, however that ends, and with those that write
    its checkpoints in the background, which end with it. Those of a job that has been killed are waited for, for up to three minutes,
    and so is another machine's lock where torchrun has restarted the job that holds it. Raises MaskLLMError naming
    the host and the process that holds the directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("a+", encoding="utf-8") as file:
        # A machine that has died keeps its lock on a shared file system until its lease ends.
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
                        f"--save {directory}: process {pid} on {host} is writing there; wait for it, stop it, or name another --save"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in _CANNOT_LOCK:
                    raise
                print(
                    f"--save {directory}: its file system has no locks ({error.strerror}); a second job would go unnoticed",
                    file=sys.stderr,
                )
                break
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job}) + "\n")
        file.flush()
        yield


def _holder(path: Path) -> tuple[str, int | None, str | None]:
    """The host, the process and torchrun's job."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values["host"], values["pid"], values["job"]
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        return "some host", None, None
