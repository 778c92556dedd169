"""Numbers as text, the same in the terminal and on the page. None, a value that was not measured, is a dash."""

from __future__ import annotations

import math
from typing import Any

UNKNOWN = "-"

RESULT_COLUMNS = ("model", "perplexity", "x best one-shot", "gap closed", "zeros", "time", "peak memory")


def format_perplexity(value: float | None) -> str:
    """Two decimals below 100, one below 1000, none above: 23.46, 174.6, 2,141."""
    if value is None:
        return UNKNOWN
    decimals = 2 if value < 99.995 else 1 if value < 999.95 else 0
    return f"{value:,.{decimals}f}"


def format_ratio(value: float | None) -> str:
    """Three decimals below 1, two below 10, one below 100, none above: 0.487, 1.02, 12.3, 112."""
    if value is None:
        return UNKNOWN
    decimals = 3 if value < 0.9995 else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:,.{decimals}f}"


def format_share(value: float | None) -> str:
    """A share as a percentage, with one decimal below 1000%: 59.2%, -123.4%, -1,299%."""
    if value is None:
        return UNKNOWN
    return f"{100 * value:,.{1 if abs(value) < 9.995 else 0}f}%"


def format_seconds(value: float | None) -> str:
    """A time: 0.42 s, 12.3 s, 4 min 05 s, 2 h 03 min."""
    if value is None:
        return UNKNOWN
    if value < 59.95:
        return f"{value:.{2 if value < 9.995 else 1}f} s"
    if round(value) < 3600:
        return f"{round(value) // 60} min {round(value) % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_bytes(value: int | None) -> str:
    """An amount of memory: 231 MiB, 2.43 GiB."""
    if value is None:
        return UNKNOWN
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def result_cells(result: dict[str, Any]) -> tuple[str, ...]:
    """The cells of RESULT_COLUMNS for one entry of `results` in `maskllm.quickstart.report.report_dict`."""
    # A perplexity is always measured. None stands for an infinite one, which JSON cannot hold.
    perplexity = math.inf if result["perplexity"] is None else result["perplexity"]
    return (
        result["name"],
        format_perplexity(perplexity),
        format_ratio(result["times_best_one_shot"]),
        format_share(result["gap_closed"]),
        format_share(result["zeros"]),
        format_seconds(result["seconds"]),
        format_bytes(result["peak_memory_bytes"]),
    )
