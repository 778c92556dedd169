"""What a benchmark prints about the machine that it ran on, and a clock that waits for the GPU."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch


def describe(device: str) -> str:
    """The GPU ("cuda") or the processor with its number of threads ("cpu"), and torch's version."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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
