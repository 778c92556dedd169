"""The result of the quickstart: its numbers, the tables for the terminal and the contents of `report.json`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from maskllm.reporting.files import only_finite
from maskllm.reporting.formatting import (
    format_bytes,
    format_perplexity,
    format_ratio,
    format_seconds,
    format_share,
    text_table,
)

RESULT_COLUMNS = ("model", "perplexity", "x best one-shot", "gap closed", "zeros", "time", "peak memory")

DENSE = "dense"
"""The name of the result of the dense model."""
LEARNED = "learned"
"""The name of the result of the learned masks, on the original's weights."""
FINAL = "final"
"""The name of the result of the model whose weights were trained after the masks."""
COMPRESSED = "compressed"
"""The name of the final model as `maskllm compress` stores it."""

SPEED_COLUMNS = ("model", "weight files", "weights in memory", "first token", "tokens a second")


@dataclass(frozen=True)
class ModelResult:
    """An evaluated model: the dense one, or one with a mask."""

    name: str
    perplexity: float
    zeros: float
    """Share of zeros in the weights of the blocks' linear layers, 0 to 1."""
    seconds: float | None
    """Time to make the model; None for the dense model."""
    peak_memory_bytes: int | None
    """Peak memory of all processes together while making the model; None for the dense model."""
    one_shot: bool
    """Whether the mask is a one-shot mask on the same frozen weights. Learned masks are compared with these."""


@dataclass(frozen=True)
class Report:
    """The contents of a report. The mappings hold plain JSON values."""

    model: str
    pattern: str
    evaluation: dict[str, Any]
    """How the perplexities were measured: data, windows and seq_length, and more for the reader (dtype, device)."""
    machine: dict[str, Any]
    """The machine that took the times. Keys ending in `_bytes` are sizes."""
    settings: dict[str, Any]
    results: list[ModelResult]
    steps: list[dict[str, Any]]
    """name, seconds and peak_memory_bytes of each step, in order."""
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl of mask learning (`maskllm.training.log.MetricsWriter`)."""
    weights_metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl of the training of the weights."""
    continuations: list[dict[str, Any]]
    """prompt, and texts: by a model's name the text that it adds to the prompt, in the order in which they are shown."""
    speed: list[dict[str, Any]]
    """`maskllm.inference.benchmark.BenchmarkResult` of the compressed and of the dense model, by these names in `model`."""


def best_one_shot(results: list[ModelResult]) -> ModelResult | None:
    """The one-shot mask with the lowest perplexity, or None without a one-shot mask."""
    return min((result for result in results if result.one_shot), key=lambda result: result.perplexity, default=None)


def times_best_one_shot(result: ModelResult, results: list[ModelResult]) -> float | None:
    """Perplexity of `result` divided by that of the best one-shot mask in `results`.

    None if `results` has no one-shot mask, or if the ratio is not finite.
    """
    best = best_one_shot(results)
    return _finite(result.perplexity / best.perplexity) if best else None


def gap_closed(result: ModelResult, results: list[ModelResult]) -> float | None:
    """How much of the perplexity gap between the best one-shot mask and the dense model `result` closes.

    (best - p) / (best - dense): 0 for the best one-shot mask, 1 for a model as good as the dense one, negative for one worse than
    the best one-shot mask. None for the dense model itself, and if there is no gap: `results` lacks a dense model or a
    one-shot mask, or the best one-shot mask is at least as good as the dense model.
    """
    best = best_one_shot(results)
    dense = next((other for other in results if other.name == DENSE), None)
    if best is None or dense is None or result.name == DENSE or best.perplexity <= dense.perplexity:
        return None
    return _finite((best.perplexity - result.perplexity) / (best.perplexity - dense.perplexity))


def table(report: Report) -> str:
    """The results as aligned plain text, one line per model, without a final newline."""
    return text_table(RESULT_COLUMNS, [result_cells(result) for result in report_dict(report)["results"]])


def result_cells(result: dict[str, Any]) -> tuple[str, ...]:
    """The cells of RESULT_COLUMNS for one entry of `results` in `report_dict`."""
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


def speed_table(report: Report) -> str:
    """The sizes and speeds as aligned plain text."""
    return text_table(SPEED_COLUMNS, list(map(speed_cells, report.speed)))


def speed_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """The cells of SPEED_COLUMNS for one entry of `Report.speed`."""
    return (
        entry["model"],
        format_bytes(entry["file_bytes"]),
        format_bytes(entry["weight_bytes"]),
        format_seconds(entry["first_token_seconds"]),
        f"{entry['tokens_per_second']:.1f}",
    )


def report_dict(report: Report) -> dict[str, Any]:
    """The contents of `report.json`: every field of `report`, and values computed from them.

    The computed values are `best_one_shot` (a name), the `seconds` and `peak_memory_bytes` of all steps, and each result's
    `times_best_one_shot` and `gap_closed`. Infinities and NaN, which JSON cannot hold, become None.
    """
    best = best_one_shot(report.results)
    values = dataclasses.asdict(report)
    for result, entry in zip(report.results, values["results"], strict=True):
        entry["times_best_one_shot"] = times_best_one_shot(result, report.results)
        entry["gap_closed"] = gap_closed(result, report.results)
    values["best_one_shot"] = best.name if best else None
    values["seconds"] = sum(step["seconds"] for step in report.steps)
    values["peak_memory_bytes"] = max((step["peak_memory_bytes"] for step in report.steps), default=None)
    return only_finite(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
