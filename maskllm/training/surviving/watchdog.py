"""Watchdog that names a rank that hangs.

A thread of every rank publishes heartbeats. When its rank makes no progress, it looks at the heartbeats of the other ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.pipeline_parallel import p2p_communication
from torch.distributed import distributed_c10d

from maskllm.processes import is_gone

_DONE = "nothing, it is done"
_PATIENCE_SECONDS = 15
_WAITING = {module.__file__ for module in (distributed_c10d, p2p_communication, param_and_grad_buffer)}
"""The source files with the code that waits for other ranks."""


@dataclass(frozen=True)
class Heartbeat:
    """The last state that a rank published."""

    number: int
    """How many heartbeats the rank has published; it grows as long as the process runs."""
    where: str
    """What the rank was doing, such as "iteration 7"."""
    steps: int
    """How often the rank has made progress."""
    position: str
    """The line of code that the rank's main thread was in."""
    in_collective: bool
    """Whether the main thread was waiting for other ranks."""
    host: str
    pid: int


class Watchdog:
    """A thread of one rank that runs during the `with` block.

    The thread calls `give_up` with one line that gives the reason. `give_up` must not return. There are three reasons:

    * This rank has made no progress for 15 seconds, and another rank on the same machine has died. NCCL does not report this.
    * This rank has made no progress for `limit` seconds, and another rank has published no heartbeat for at least half of that
      time. The line names the silent ranks and what they were last doing.
    * This rank has made no progress for `limit` seconds because it waits for others in a collective. Another rank is alive, but for
      at least half of that time it has neither made progress nor waited in a collective (for example, a file system hangs).
      The line names those ranks and the line of code that they are in.

    In all other cases (all work on something long, or all wait on a GPU), this rank's log gets the line of code of every rank.
    A wait that never ends is then ended by the timeout of the process group.

    Args:
        store: Holds the heartbeats. No other thread may block in it, and no other attempt of the job may use its keys.
        rank: This rank.
        ranks: How many ranks there are.
        limit: Seconds without progress, as described above.
        give_up: Ends this process, as described above.
    """

    def __init__(self, store: dist.Store, rank: int, ranks: int, *, limit: float, give_up: Callable[[str], None]) -> None:
        self.store = store
        self.rank = rank
        self.ranks = ranks
        self.limit = limit
        self.give_up = give_up
        self._where = "setting up"
        self._number = 0
        self._steps = 0
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
        with contextlib.suppress(RuntimeError):  # the rank that hosts the store may have ended
            self._publish()

    def progress(self, where: str | None = None) -> None:
        """Record that this rank has made progress. `where` says what it does now, such as "iteration 7"; None: as before."""
        self._last_progress = time.monotonic()
        self._steps += 1
        if where not in (None, self._where):
            self._where = where
            self._wake.set()

    def describe(self) -> str:
        """Return the end of a sentence: what this rank is doing, and which other ranks on this machine have died."""
        gone = ""
        with contextlib.suppress(Exception):  # the store may be gone too
            gone = self._gone()
        return f" in {self._where}{gone}"

    def _gone(self) -> str:
        """Name the other ranks on this machine that ended before they were done."""
        return "".join(
            f"; rank {rank} (process {beat.pid}) has died, in {beat.where}"
            for rank, beat in self._heartbeats().items()
            if rank != self.rank and beat.host == socket.gethostname() and beat.where != _DONE and is_gone(beat.pid)
        )

    def _run(self) -> None:
        interval = min(5.0, self.limit / 12)
        before: dict[int, Heartbeat] | None = None
        """The heartbeats read after half of the limit without progress."""
        seen = looked = time.monotonic()
        """`seen`: when `before` was read. `looked`: when this loop last ran."""
        told = False
        """Whether the positions of all ranks are already in the log."""
        while True:
            self._wake.wait(interval)
            self._wake.clear()
            if self._closed:
                return
            try:
                self._publish()
                time_before, looked = looked, time.monotonic()
                if looked - time_before > self.limit / 4:  # this process was suspended, perhaps with others
                    before = None
                stalled = looked - self._last_progress
                if stalled >= _PATIENCE_SECONDS and (gone := self._gone()):
                    self.give_up(f"rank {self.rank} waits in {self._where}{gone}")
                if stalled < self.limit / 2:
                    before, told = None, False
                elif before is None:
                    before, seen = self._heartbeats(), looked
                elif stalled >= self.limit and looked - seen >= self.limit / 2:
                    now = self._heartbeats()
                    if accusation := self._accuse(before, now):
                        faulthandler.dump_traceback(all_threads=True)
                        self.give_up(accusation)
                    elif not told:
                        told = True
                        print(f"no progress for {self.limit:.0f} s; {_positions(now)}", file=sys.stderr, flush=True)
            except (RuntimeError, ValueError):  # the store does not answer: the rank hosting it is gone, and collectives will fail
                before = None

    def _accuse(self, before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> str | None:
        """Return a line that names the silent or stuck ranks, or None if there are none.

        `before` and `now` are all ranks' heartbeats after about half of the limit and after all of it.
        """
        others = {rank: beat for rank, beat in now.items() if rank != self.rank and beat.where != _DONE}
        silent = {rank: beat for rank, beat in others.items() if beat == before.get(rank)}
        stuck = {
            rank: beat
            for rank, beat in others.items()
            if rank in before
            and beat.steps == before[rank].steps
            and not (beat.in_collective or before[rank].in_collective)
            and now[self.rank].in_collective
        }
        if silent:
            names = ", ".join(f"{_name(rank, beat)}, last heard of in {beat.where}" for rank, beat in silent.items())
            problem = f"no sign of life from {names}"
        elif stuck:
            names = ", ".join(f"{_name(rank, beat)}, which is at {beat.position}, in {beat.where}" for rank, beat in stuck.items())
            problem = f"the others wait for {names}"
        else:
            return None
        return (
            f"no progress for {self.limit:.0f} s (--distributed-timeout-minutes {self.limit / 60:g}): {problem}; "
            f"rank {self.rank} waits in {self._where}"
        )

    def _publish(self) -> None:
        self._number += 1
        position, in_collective = self._main_thread()
        beat = Heartbeat(
            self._number, self._where, self._steps, position, in_collective, host=socket.gethostname(), pid=os.getpid()
        )
        self.store.set(str(self.rank), json.dumps(asdict(beat)))

    def _main_thread(self) -> tuple[str, bool]:
        """Return the line of code that the main thread is in, and whether it waits there for other ranks."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is None:
            return "its end", False
        position = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        while frame is not None and frame.f_code.co_filename not in _WAITING:
            frame = frame.f_back
        return position, frame is not None

    def _heartbeats(self) -> dict[int, Heartbeat]:
        """Return the last heartbeat of each rank that has published one."""
        ranks = [rank for rank in range(self.ranks) if self.store.check([str(rank)])]
        return {rank: Heartbeat(**json.loads(self.store.get(str(rank)))) for rank in ranks}


def _name(rank: int, beat: Heartbeat) -> str:
    return f"rank {rank} (process {beat.pid} on {beat.host})"


def _positions(beats: dict[int, Heartbeat]) -> str:
    return "; ".join(f"{_name(rank, beat)} is at {beat.position}, in {beat.where}" for rank, beat in beats.items())
