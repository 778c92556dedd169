"""The watchdog blames the ranks that are silent, and nobody while all are alive."""

from __future__ import annotations

import os
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


def test_a_silent_rank_is_named_with_its_last_place():
    dogs, lines, said = ranks(3, dist.HashStore())
    hung = dogs[1]
    with dogs[0], dogs[2]:
        with hung:  # its thread ends with the block: from then on it publishes nothing
            hung.progress("iteration 4")
            time.sleep(0.2)
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
    with dogs[1]:
        pass  # has published once and is gone
    with dogs[0]:
        for step in range(20):
            dogs[0].progress(f"iteration {step}")
            time.sleep(LIMIT / 6)
    assert not lines
