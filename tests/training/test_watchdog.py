"""The watchdog blames the ranks that are silent, and nobody while all are alive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time

import torch.distributed as dist

from maskllm.training.watchdog import Watchdog

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


def test_a_long_step_of_ranks_that_are_alive_is_no_fault():
    dogs, lines, _ = ranks(2, dist.HashStore())
    with dogs[0], dogs[1]:
        time.sleep(3 * LIMIT)
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
    monkeypatch.setattr("maskllm.training.watchdog._PATIENCE_SECONDS", 0.2)
    store = dist.HashStore()
    dead = subprocess.Popen(["true"])
    dead.wait()
    store.set("1", json.dumps({"number": 3, "where": "iteration 4", "host": socket.gethostname(), "pid": dead.pid}))
    dogs, lines, said = ranks(2, store)
    dogs[0].limit = 6.0
    with dogs[0]:
        dogs[0].progress("iteration 5")
        assert said.wait(5)
    assert lines[0] == (0, f"rank 0 waits in iteration 5; rank 1 (process {dead.pid}) has died, in iteration 4")
