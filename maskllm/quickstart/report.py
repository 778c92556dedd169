"""What mask learning brought: one table for the terminal, `report.json` for programs and `report.html` for people."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskllm.files import write_json, write_text
from maskllm.quickstart.formatting import RESULT_COLUMNS, result_cells
from maskllm.quickstart.page import html_page

DENSE = "dense"
"""The name of the result that the others are measured against."""


@dataclass(frozen=True)
class ModelResult:
    """A model that was evaluated: the dense one, or one with a mask."""

    name: str
    perplexity: float
    zeros: float
    """Share of zeros in the weights of the block's linear layers, 0 to 1."""
    seconds: float | None
    """Time to make it; None for the dense model."""
    peak_memory_bytes: int | None
    """Most memory of all processes together while it was made; None for the dense model."""
    one_shot: bool
    """Whether it is a one-shot mask on the same frozen weights, which learned masks are compared with."""


@dataclass(frozen=True)
class Report:
    """Everything a report tells. The mappings hold plain JSON values."""

    model: str
    pattern: str
    evaluation: dict[str, Any]
    """What the perplexities are of: data, windows and seq_length, and what else there is to tell (dtype, device)."""
    machine: dict[str, Any]
    """What the times were measured on; keys ending in `_bytes` are sizes."""
    settings: dict[str, Any]
    results: list[ModelResult]
    steps: list[dict[str, Any]]
    """name, seconds and peak_memory_bytes of each step, in order."""
    metrics: list[dict[str, Any]]
    """The lines of the training's metrics.jsonl (maskllm/training/metrics.py)."""


def best_one_shot(results: list[ModelResult]) -> ModelResult | None:
    """The one-shot mask with the lowest perplexity; None where there is none."""
    return min((result for result in results if result.one_shot), key=lambda result: result.perplexity, default=None)


def times_best_one_shot(result: ModelResult, results: list[ModelResult]) -> float | None:
    """Perplexity of `result` over that of the best one-shot mask in `results`; None where there is no such number."""
    best = best_one_shot(results)
    return _finite(result.perplexity / best.perplexity) if best else None


def gap_closed(result: ModelResult, results: list[ModelResult]) -> float | None:
    """Share of the gap in perplexity between the best one-shot mask and the dense model that `result` closed.

    (best - p) / (best - dense): 0 is the best one-shot mask, 1 the dense model, negative what is worse than the best one-shot
    mask. None for the dense model itself, and where there is no gap: no dense model or no one-shot mask among `results`, or the
    best mask no worse than dense.
    """
    best = best_one_shot(results)
    dense = next((other for other in results if other.name == DENSE), None)
    if best is None or dense is None or result.name == DENSE or best.perplexity <= dense.perplexity:
        return None
    return _finite((best.perplexity - result.perplexity) / (best.perplexity - dense.perplexity))


def table(report: Report) -> str:
    """The results as aligned plain text, a line a model, without a final newline."""
    rows = [RESULT_COLUMNS, *map(result_cells, report_dict(report)["results"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def report_dict(report: Report) -> dict[str, Any]:
    """What `report.json` holds: every field of `report`, and what follows from them.

    Added are `best_one_shot` (a name), `seconds` and `peak_memory_bytes` of all steps, and in each result `times_best_one_shot`
    and `gap_closed`. Numbers that are not finite, which JSON has none of, are null.
    """
    best = best_one_shot(report.results)
    values = dataclasses.asdict(report)
    for result, entry in zip(report.results, values["results"], strict=True):
        entry["times_best_one_shot"] = times_best_one_shot(result, report.results)
        entry["gap_closed"] = gap_closed(result, report.results)
    values["best_one_shot"] = best.name if best else None
    values["seconds"] = sum(step["seconds"] for step in report.steps)
    values["peak_memory_bytes"] = max((step["peak_memory_bytes"] for step in report.steps), default=None)
    return _only_finite(values)


def write_report(report: Report, directory: str | os.PathLike) -> None:
    """Write `report.json` and `report.html`, which shows the same and needs no other file, into `directory`."""
    values = report_dict(report)
    write_json(Path(directory) / "report.json", values)
    write_text(Path(directory) / "report.html", html_page(values))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _only_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _only_finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_only_finite(entry) for entry in value]
    return _finite(value) if isinstance(value, float) else value
