"""Numbers as text, the same in the terminal and on the page. None, a value that was not measured, is a dash."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "-"


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


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned plain text, one line for each row, without a final newline. The first column is words, the others are numbers."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
