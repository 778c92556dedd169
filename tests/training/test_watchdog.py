"""The watchdog blames the ranks that are silent, and nobody while all are alive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from maskllm.training.surviving.watchdog import Heartbeat, Watchdog

LIMIT = 1.2


def ranks(count: int, store: dist.Store) -> tuple[list[Watchdog], list[tuple[int, str]], threading.Event]:
    lines: list[tuple[int, str]] = []
    said = threading.Event()

    def give_up(rank: int):
        def say(line: str) -> None:
            lines.append((rank, line))
            said.set()

        return say

    return [Watchdog(store, rank, count, limit=LIMIT, give_up=give_up(rank)) for rank in range(count)], lines, said


def hang(dog: Watchdog) -> None:
    """End its thread: from then on it publishes nothing."""
    dog._closed = True
    dog._wake.set()
    dog._thread.join()


def test_a_silent_rank_is_named_with_its_last_place():
    dogs, lines, said = ranks(3, dist.HashStore())
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


def stand(dog: Watchdog, position: str, *, in_collective: bool) -> None:
    """Let its main thread, which all dogs here share, be somewhere."""
    dog._main_thread = lambda: (position, in_collective)


def test_a_rank_that_is_alive_but_stuck_is_named_with_its_line_of_code_by_one_that_waits_for_it():
    dogs, lines, said = ranks(3, dist.HashStore())
    stand(dogs[0], "trainer.py:10 (_any_rank)", in_collective=True)
    stand(dogs[1], "data.py:88 (__getitem__)", in_collective=False)
    stand(dogs[2], "trainer.py:10 (_any_rank)", in_collective=True)
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


def test_a_rank_that_gets_on_within_a_long_step_is_not_stuck():
    dogs, lines, _ = ranks(2, dist.HashStore())
    stand(dogs[0], "trainer.py:10 (_any_rank)", in_collective=True)
    stand(dogs[1], "data.py:88 (__getitem__)", in_collective=False)
    with dogs[0], dogs[1]:
        for _ in range(20):
            dogs[1].progress()
            time.sleep(LIMIT / 6)
    assert not lines


def test_where_all_are_at_work_or_all_wait_the_log_has_where(capsys):
    dogs, lines, _ = ranks(2, dist.HashStore())
    for dog in dogs:
        stand(dog, "trainer.py:20 (_step)", in_collective=False)
        dog.progress("iteration 5")
    with dogs[0], dogs[1]:
        time.sleep(3 * LIMIT)
    assert not lines
    log = capsys.readouterr().err
    assert log.count("no progress for 1 s;") == 2, "each rank tells once"
    assert f"rank 1 (process {os.getpid()} on {socket.gethostname()}) is at trainer.py:20 (_step), in iteration 5" in log


def test_a_long_step_of_ranks_that_are_alive_is_no_fault():
    dogs, lines, _ = ranks(2, dist.HashStore())
    with dogs[0], dogs[1]:
        time.sleep(3 * LIMIT)
    assert not lines


@pytest.mark.parametrize(
    "looks",
    [
        # of rank 0: after how many seconds, and whether rank 1 publishes before it
        [(0.1, True)] * 6 + [(2 * LIMIT, False)] + [(0.1, True)] * 20,
        [(0.1, True)] * 4 + [(2 * LIMIT, True), (0.1, False)] + [(0.1, True)] * 20,
    ],
    ids=["after it has begun to look", "before"],
)
def test_ranks_that_were_stopped_together_and_go_on_are_not_silent(looks, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("maskllm.training.surviving.watchdog.time", SimpleNamespace(monotonic=lambda: clock[0]))
    (dog, other), lines, _ = ranks(2, dist.HashStore())
    left = iter(looks)

    def wait(_: float) -> None:
        seconds, publishes = next(left, (None, None))
        if seconds is None:
            dog._closed = True
            return
        clock[0] += seconds
        if publishes:
            other._publish()

    dog._wake = SimpleNamespace(wait=wait, clear=lambda: None)
    dog._run()
    assert clock[0] > 3 * LIMIT
    assert not lines


def test_progress_keeps_a_rank_from_looking_at_the_others():
    dogs, lines, _ = ranks(2, dist.HashStore())
    dogs[1].__enter__()
    hang(dogs[1])
    with dogs[0]:
        for step in range(20):
            dogs[0].progress(f"iteration {step}")
            time.sleep(LIMIT / 6)
    assert not lines


def test_a_rank_that_is_done_is_not_missed():
    dogs, lines, _ = ranks(2, dist.HashStore())
    with dogs[1]:
        pass
    with dogs[0]:
        time.sleep(3 * LIMIT)
    assert not lines


def test_a_dead_process_of_this_machine_is_named_long_before_the_limit(monkeypatch):
    monkeypatch.setattr("maskllm.training.surviving.watchdog._PATIENCE_SECONDS", 0.2)
    store = dist.HashStore()
    dead = subprocess.Popen(["true"])
    dead.wait()
    beat = Heartbeat(3, "iteration 4", 1, "trainer.py:10 (_step)", in_collective=False, host=socket.gethostname(), pid=dead.pid)
    store.set("1", json.dumps(asdict(beat)))
    dogs, lines, said = ranks(2, store)
    dogs[0].limit = 6.0
    with dogs[0]:
        dogs[0].progress("iteration 5")
        assert said.wait(5)
    assert lines[0] == (0, f"rank 0 waits in iteration 5; rank 1 (process {dead.pid}) has died, in iteration 4")
