"""plan_memory.py runs this in each rank: several trainings in the same process, each with its own peak memory.

usage: python -m benchmarks.trainings FILE.json, where FILE.json is a list of command lines of `maskllm.train`
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

from maskllm import train

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
RETURNED_BYTES = 65536


def return_freed_memory() -> None:
    """Make the C library return freed memory to the system, in blocks of RETURNED_BYTES or more, instead of keeping it."""
    library = ctypes.CDLL(None)
    for parameter in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
        library.mallopt(parameter, RETURNED_BYTES)
    library.malloc_trim(0)


def forget_peak() -> None:
    """Set this process's peak resident memory, VmHWM, to what is resident now (proc(5))."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def main(path: str) -> int:
    """Run all trainings; returns the first exit status that is not 0."""
    return_freed_memory()
    for command in json.loads(Path(path).read_text()):
        forget_peak()
        if status := train.main(command):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
