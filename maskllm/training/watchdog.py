"""A rank that hangs is named: every rank's thread publishes a heartbeat, and looks at the others' when its own rank gets no further."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from maskllm.resident import is_gone

_DONE = "nothing, it is done"
_PATIENCE_SECONDS = 15


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said of itself."""

    number: int
    """Counts up for as long as the process runs."""
    where: str
    """What the rank was doing."""
    host: str
    pid: int


class Watchdog:
    """A thread of one rank, for as long as the `with` block runs.

    `give_up` is called, in the thread, with a line that says why, and must not return:

    * when this rank has made no progress for 15 seconds and another rank of its machine has died, which NCCL does not tell;
    * when it has made none for `limit` seconds, and another rank has published no heartbeat for half of that time or more: the line
      names the ranks that are silent and what they were last doing.

    Where all are alive (a long save, a slow disk) nothing happens: the process group's own timeout ends a wait that never ends.

    Args:
        store: Where the heartbeats are; no other thread may block in it. Its keys are this attempt's alone.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, *, limit: float, give_up: Callable[[str], None]) -> None:
        self.store = store
        self.rank = rank
        self.ranks = ranks
        self.limit = limit
        self.give_up = give_up
        self._where = "setting up"
        self._number = 0
        self._last_progress = time.monotonic()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._publish()
        self._thread.start()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        self._closed = True
        self._wake.set()
        self._thread.join()
        if failure is not None:
            return
        self._where = _DONE
        with contextlib.suppress(RuntimeError):  # the store's own rank may have ended
            self._publish()

    def progress(self, where: str) -> None:
        """Note that this rank has got further: it is now at `where`, such as "iteration 7"."""
        self._last_progress = time.monotonic()
        if where != self._where:
            self._where = where
            self._wake.set()

    def describe(self) -> str:
        """Where this rank is, and which other ranks of this machine have gone, to end a sentence with."""
        gone = ""
        with contextlib.suppress(Exception):  # the store may have gone too
            gone = self._gone()
        return f" in {self._where}{gone}"

    def _gone(self) -> str:
        """Which other ranks of this machine have ended without being done."""
        return "".join(
            f"; rank {rank} (process {beat.pid}) has died, in {beat.where}"
            for rank, beat in self._heartbeats().items()
            if rank != self.rank and beat.host == socket.gethostname() and beat.where != _DONE and is_gone(beat.pid)
        )

    def _run(self) -> None:
        interval = min(5.0, self.limit / 12)
        before: dict[int, Heartbeat] | None = None
        """The others' heartbeats after half of the limit without progress."""
        while True:
            self._wake.wait(interval)
            self._wake.clear()
            if self._closed:
                return
            try:
                self._publish()
                stalled = time.monotonic() - self._last_progress
                if stalled >= _PATIENCE_SECONDS and (gone := self._gone()):
                    self.give_up(f"rank {self.rank} waits in {self._where}{gone}")
                if stalled < self.limit / 2:
                    before = None
                elif before is None:
                    before = self._heartbeats()
                elif stalled >= self.limit:
                    silent = {rank: beat for rank, beat in self._heartbeats().items() if beat == before.get(rank)}
                    silent = {rank: beat for rank, beat in silent.items() if rank != self.rank and beat.where != _DONE}
                    if silent:
                        faulthandler.dump_traceback(all_threads=True)
                        self.give_up(self._accuse(silent))
            except (RuntimeError, ValueError):  # the store does not answer: its own rank has gone, and the collectives will fail
                before = None

    def _accuse(self, silent: dict[int, Heartbeat]) -> str:
        names = ", ".join(
            f"rank {rank} (process {beat.pid} on {beat.host}), last heard of in {beat.where}" for rank, beat in silent.items()
        )
        return (
            f"no progress for {self.limit:.0f} s (--distributed-timeout-minutes {self.limit / 60:g}): no sign of life from {names}; "
            f"rank {self.rank} waits in {self._where}"
        )

    def _publish(self) -> None:
        self._number += 1
        beat = Heartbeat(self._number, self._where, socket.gethostname(), os.getpid())
        self.store.set(str(self.rank), json.dumps(asdict(beat)))

    def _heartbeats(self) -> dict[int, Heartbeat]:
        """Of the ranks that have published one."""
        ranks = [rank for rank in range(self.ranks) if self.store.check([str(rank)])]
        return {rank: Heartbeat(**json.loads(self.store.get(str(rank)))) for rank in ranks}
