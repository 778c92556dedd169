"""A rank that hangs is named: every rank's thread publishes a heartbeat, and looks at the others' when its own rank gets no further."""

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
    """What a rank last said of itself."""

    number: int
    """Counts up for as long as the process runs."""
    where: str
    """What the rank was doing."""
    steps: int
    """How often it has made progress."""
    position: str
    """The line of code its main thread was in."""
    in_collective: bool
    """Whether it was there to wait for other ranks."""
    host: str
    pid: int


class Watchdog:
    """A thread of one rank, for as long as the `with` block runs.

    `give_up` is called, in the thread, with a line that says why, and must not return:

    * when this rank has made no progress for 15 seconds and another rank of its machine has died, which NCCL does not tell;
    * when it has made none for `limit` seconds, and another rank has published no heartbeat for half of that time or more: the line
      names the ranks that are silent and what they were last doing;
    * when it has made none for `limit` seconds because it waits for others in a collective, and another rank, alive, has for half of
      that time or more neither made any nor waited: the line names those ranks and the line of code they are in (a file system that
      does not answer).

    Otherwise (all work on something long; all wait on a GPU) every rank's line of code goes to this rank's log, and the process group's
    own timeout ends a wait that never ends.

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
        with contextlib.suppress(RuntimeError):  # the store's own rank may have ended
            self._publish()

    def progress(self, where: str | None = None) -> None:
        """Note that this rank has got further, to `where`, such as "iteration 7", or within it."""
        self._last_progress = time.monotonic()
        self._steps += 1
        if where not in (None, self._where):
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
        """The heartbeats after half of the limit without progress."""
        seen = looked = time.monotonic()
        """When those heartbeats were seen, and when this rank last looked at all."""
        told = False
        """Whether the log has where the ranks stand."""
        while True:
            self._wake.wait(interval)
            self._wake.clear()
            if self._closed:
                return
            try:
                self._publish()
                time_before, looked = looked, time.monotonic()
                if looked - time_before > self.limit / 4:  # this process was stopped itself, and others perhaps with it
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
            except (RuntimeError, ValueError):  # the store does not answer: its own rank has gone, and the collectives will fail
                before = None

    def _accuse(self, before: dict[int, Heartbeat], now: dict[int, Heartbeat]) -> str | None:
        """Which ranks this one waits for in vain, after half of the limit with the heartbeats `before` and another with `now`."""
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
        """The line of code the main thread is in, and whether it was called to wait for other ranks."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if frame is None:
            return "its end", False
        position = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        while frame is not None and frame.f_code.co_filename not in _WAITING:
            frame = frame.f_back
        return position, frame is not None

    def _heartbeats(self) -> dict[int, Heartbeat]:
        """Of the ranks that have published one."""
        ranks = [rank for rank in range(self.ranks) if self.store.check([str(rank)])]
        return {rank: Heartbeat(**json.loads(self.store.get(str(rank)))) for rank in ranks}


def _name(rank: int, beat: Heartbeat) -> str:
    return f"rank {rank} (process {beat.pid} on {beat.host})"


def _positions(beats: dict[int, Heartbeat]) -> str:
    return "; ".join(f"{_name(rank, beat)} is at {beat.position}, in {beat.where}" for rank, beat in beats.items())
