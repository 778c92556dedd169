"""What a verb cost."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fill the mapping, when the block ends, with its "seconds" and the "peak_memory_bytes" that this process has been resident with."""
    cost: dict[str, float] = {}
    started = time.perf_counter()
    yield cost
    cost["seconds"] = time.perf_counter() - started
    cost["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
