"""Run by plan_memory.py, alone or under torchrun: several trainings in the same processes, each with its own peak memory.

usage: python -m benchmarks.trainings FILE.json, where FILE.json is a list of command lines of `maskllm.train`
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from maskllm import train


def forget_peak() -> None:
    """Set this process's peak resident memory, VmHWM, to what is resident now (proc(5))."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def main(path: str) -> int:
    """Train them all; returns the first exit status that is not 0."""
    for command in json.loads(Path(path).read_text()):
        forget_peak()
        if status := train.main(command):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
