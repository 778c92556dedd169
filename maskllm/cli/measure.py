"""What a verb cost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from maskllm.processes import peak_resident_bytes


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Fill the mapping, when the block ends, with its "seconds" and the "peak_memory_bytes" that this process has been resident with."""
    cost: dict[str, float] = {}
    started = time.perf_counter()
    yield cost
    cost["seconds"] = time.perf_counter() - started
    cost["peak_memory_bytes"] = peak_resident_bytes()
