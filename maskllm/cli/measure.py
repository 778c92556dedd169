"""Time and memory of a verb."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from maskllm.processes import peak_resident_bytes


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Measure a block: when it ends, the mapping gets its "seconds" and the process's peak resident memory, "peak_memory_bytes"."""
    cost: dict[str, float] = {}
    started = time.perf_counter()
    yield cost
    cost["seconds"] = time.perf_counter() - started
    cost["peak_memory_bytes"] = peak_resident_bytes()
