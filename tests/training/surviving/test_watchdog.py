"""The watchdog names ranks that are silent or stuck, and none while all make progress."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from maskllm.training.surviving.watchdog import Heartbeat, Watchdog

LIMIT = 1.2


def watchdogs(count: int, store: dist.Store) -> tuple[list[Watchdog], list[tuple[int, str]], threading.Event]:
    """One watchdog for each rank, their accusations (rank, line), and an event that the first accusation sets."""
    lines: list[tuple[int, str]] = []
    said = threading.Event()

    def give_up(rank: int) -> Callable[[str], None]:
        def say(line: str) -> None:
            lines.append((rank, line))
            said.set()

        return say

    return [Watchdog(store, rank, count, limit=LIMIT, give_up=give_up(rank)) for rank in range(count)], lines, said


def hang(dog: Watchdog) -> None:
    """End its thread, so that it publishes nothing more."""
    dog._closed = True
    dog._wake.set()
    dog._thread.join()


def stand(dog: Watchdog, position: str, *, in_collective: bool) -> None:
    """Set where the main thread of its rank is. All watchdogs here share one main thread."""
    dog._main_thread = lambda: (position, in_collective)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The watchdog's time, which only the test moves."""
    now = [0.0]
    monkeypatch.setattr("maskllm.training.surviving.watchdog.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def watch(dog: Watchdog, clock: list[float], looks: list[tuple[float, Callable[[], None]]]) -> None:
    """Run the loop of `dog` in this thread. For each look, so many seconds pass, and the function is called before it."""
    left, dog._closed = iter(looks), False

    def wait(_: float) -> None:
        seconds, happen = next(left, (0, None))
        clock[0] += seconds
        if happen is None:
            dog._closed = True
        else:
            happen()

    dog._wake = SimpleNamespace(wait=wait, clear=lambda: None, set=lambda: None)
    dog._run()


def test_a_silent_rank_is_named_with_what_it_was_doing():
    dogs, lines, said = watchdogs(3, dist.HashStore())
    hung = dogs[1]
    with dogs[0], dogs[2]:
        hung.__enter__()
        hung.progress("iteration 4")
        time.sleep(0.2)
        hang(hung)
        for dog in (dogs[0], dogs[2]):
            dog.progress("iteration 5")
        assert said.wait(20)
    rank, line = lines[0]
    assert rank in (0, 2)
    assert f"no sign of life from rank 1 (process {os.getpid()} on " in line
    assert "last heard of in iteration 4;" in line
    assert line.endswith(f"rank {rank} waits in iteration 5")


def test_a_stuck_rank_is_named_with_its_line_of_code():
    dogs, lines, said = watchdogs(3, dist.HashStore())
    stand(dogs[0], "stopping.py:10 (any_rank)", in_collective=True)
    stand(dogs[1], "data.py:88 (__getitem__)", in_collective=False)
    stand(dogs[2], "stopping.py:10 (any_rank)", in_collective=True)
    with dogs[0], dogs[1], dogs[2]:
        for dog in dogs:
            dog.progress("iteration 5")
        assert said.wait(20)
    rank, line = lines[0]
    assert rank in (0, 2)
    assert (
        f"the others wait for rank 1 (process {os.getpid()} on {socket.gethostname()}), which is at data.py:88 (__getitem__)"
        in line
    )
    assert line.endswith(f"rank {rank} waits in iteration 5")


def test_a_rank_that_makes_progress_within_a_long_step_is_not_stuck(clock):
    (dog, other), lines, _ = watchdogs(2, dist.HashStore())
    stand(dog, "stopping.py:10 (any_rank)", in_collective=True)
    stand(other, "data.py:88 (__getitem__)", in_collective=False)

    def make_progress() -> None:
        other.progress()
        other._publish()

    watch(dog, clock, [(0.1, make_progress)] * 40)
    assert not lines
    watch(dog, clock, [(0.1, other._publish)] * 40)
    assert lines, "it would not have been named without progress either"


@pytest.mark.parametrize("in_collective", [False, True], ids=["all work", "all wait"])
def test_ranks_that_are_all_in_the_same_place_are_logged_and_not_named(in_collective, clock, capsys):
    (dog, other), lines, _ = watchdogs(2, dist.HashStore())
    for one in (dog, other):
        stand(one, "step.py:20 (__call__)", in_collective=in_collective)
        one.progress("iteration 5")
    watch(dog, clock, [(0.1, other._publish)] * 40)
    assert not lines
    log = capsys.readouterr().err
    assert log.count("no progress for 1 s;") == 1
    assert f"rank 1 (process {os.getpid()} on {socket.gethostname()}) is at step.py:20 (__call__), in iteration 5" in log


@pytest.mark.parametrize("moment", ["after half of the limit", "before"])
def test_ranks_that_were_stopped_together_and_go_on_are_not_silent(moment, clock):
    (dog, other), lines, _ = watchdogs(2, dist.HashStore())
    publish, silent = (0.1, other._publish), (0.1, lambda: None)
    if moment == "before":
        looks = [publish] * 4 + [(2 * LIMIT, other._publish), silent] + [publish] * 20
    else:
        looks = [publish] * 6 + [(2 * LIMIT, lambda: None)] + [publish] * 20
    watch(dog, clock, looks)
    assert clock[0] > 3 * LIMIT
    assert not lines


def test_a_rank_that_makes_progress_does_not_look_at_the_others(clock):
    (dog, silent), lines, _ = watchdogs(2, dist.HashStore())
    silent._publish()
    watch(dog, clock, [(LIMIT / 6, lambda: dog.progress("iteration 5"))] * 20)
    assert not lines
    watch(dog, clock, [(LIMIT / 6, lambda: None)] * 20)
    assert lines, "it would not have been named without progress either"


def test_a_rank_that_is_done_is_not_missed(clock):
    (dog, other), lines, _ = watchdogs(2, dist.HashStore())
    with other:
        pass
    watch(dog, clock, [(0.1, lambda: None)] * 40)
    assert not lines


def test_a_dead_process_of_this_machine_is_named_long_before_the_limit(monkeypatch):
    monkeypatch.setattr("maskllm.training.surviving.watchdog._PATIENCE_SECONDS", 0.2)
    store = dist.HashStore()
    dead = subprocess.Popen(["true"])
    dead.wait()
    beat = Heartbeat(3, "iteration 4", 1, "step.py:10 (__call__)", in_collective=False, host=socket.gethostname(), pid=dead.pid)
    store.set("1", json.dumps(asdict(beat)))
    dogs, lines, said = watchdogs(2, store)
    dogs[0].limit = 6.0
    with dogs[0]:
        dogs[0].progress("iteration 5")
        assert said.wait(5)
    assert lines[0] == (0, f"rank 0 waits in iteration 5; rank 1 (process {dead.pid}) has died, in iteration 4")
