"""What a measurement says about its machine, a clock that waits for the GPU, and the bandwidth of memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

SMALLEST_CACHE = 1 << 25
"""Bytes of the last-level cache if the system does not tell its size."""


def describe() -> str:
    """The GPU if torch can use one, and the processor with its number of cores."""
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """The processor's model name."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    found = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.processor() or platform.machine())


def wall_clock(device: str) -> float:
    """`time.perf_counter()`, after all work on the GPU is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cache_bytes(device: str = "cpu") -> int:
    """The size of the last-level cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [os.sysconf(name) for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if name in os.sysconf_names]
    return max([*sizes, SMALLEST_CACHE])


def copy_bandwidth(device: str, clock: Callable[[], float], repeats: int = 5) -> float:
    """Bytes a second that a copy reads and writes, together. Source and target are written before, and larger than the caches."""
    source = torch.ones(4 * cache_bytes(device), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    target.fill_(1)  # `zeros_like` may map the same page of zeros again and again
    best = float("inf")
    for _ in range(repeats):
        seconds = -clock()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, seconds + clock())
    return 2 * source.nbytes / best
