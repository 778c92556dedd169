"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """A Markdown table with aligned columns; the first `left` columns are words, the others are numbers."""
    widths = [max(3, *(len(row[column]) for row in [header, *cells])) for column in range(len(header))]
    lines = []
    for row in [header, *cells]:
        padded = [
            text.ljust(width) if index < left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    rule = ["-" * width if index < left else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return [lines[0], f"| {' | '.join(rule)} |", *lines[1:]]
