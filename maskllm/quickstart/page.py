"""The quickstart's report: `report.json` for programs and the page `report.html` for people."""

from __future__ import annotations

import os
from html import escape
from typing import Any

from maskllm.quickstart.report import (
    COMPRESSED,
    FINAL,
    LEARNED,
    RESULT_COLUMNS,
    SPEED_COLUMNS,
    Report,
    report_dict,
    result_cells,
    speed_cells,
)
from maskllm.reporting.charts import Series, line_chart
from maskllm.reporting.files import write_report_files
from maskllm.reporting.formatting import (
    UNKNOWN,
    format_bytes,
    format_perplexity,
    format_ratio,
    format_seconds,
    format_share,
)
from maskllm.reporting.page import charts_section, document, pairs, rows_table, steps_table, tiles


def write_report(report: Report, directory: str | os.PathLike) -> None:
    """Write `report.json` and `report.html` into `directory`. Both hold the same; the page needs no other file."""
    values = report_dict(report)
    write_report_files(values, _page(values), directory)


def _page(report: dict[str, Any]) -> str:
    """The page that shows what `report_dict` returns. Every text in it is escaped."""
    evaluation = report["evaluation"]
    best = report["best_one_shot"] or UNKNOWN
    trained = [result["name"] for result in report["results"] if result["name"] in (LEARNED, FINAL)]
    sections = [
        _texts(report),
        _speed(report["speed"]),
        charts_section("Mask learning", _mask_charts(report["metrics"])),
        charts_section("Weights trained too", _weights_charts(report["weights_metrics"])),
    ]
    return document(
        f"{report['pattern']} masks of {report['model']}",
        f"Perplexity on {evaluation['data']}, {evaluation['windows']} windows of {evaluation['seq_length']} tokens.",
        f"""{tiles(_headlines(report))}
<h2>Models</h2>
{rows_table("Models", RESULT_COLUMNS, map(result_cells, report["results"]), trained[-1] if trained else None)}
<p class="muted">Gap closed: how much of the perplexity gap between the best one-shot mask ({escape(best)}) and the dense model
a model closes. Zeros: the share of zeros in the blocks' linear layers. Time and peak memory: for making the model, all processes
together. The final model starts from the learned masks and includes their time. Its weights were trained too; all others have the dense
model's weights.</p>
{"".join(sections)}
<h2>Steps</h2>
{steps_table(report["steps"])}
<h2>How it was measured</h2>
{pairs({"Evaluation": evaluation, "Settings": report["settings"], "Machine": report["machine"]})}""",
    )


def _headlines(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The headline numbers: what the trained models achieved, and what they cost."""
    results = {result["name"]: result for result in report["results"]}
    dense, best = results.get("dense"), results.get(report["best_one_shot"])
    found = []
    for name, words in ((FINAL, "final model"), (LEARNED, "learned masks")):
        if name not in results:
            continue
        result = results[name]
        beside = f"dense {format_perplexity(dense['perplexity'])}" if dense else ""
        found.append((f"Perplexity, {words}", format_perplexity(result["perplexity"]), beside))
        if best:
            ratio = f"{format_ratio(result['times_best_one_shot'])} \N{MULTIPLICATION SIGN}"
            found.append(("Times the best one-shot mask", ratio, f"{best['name']} {format_perplexity(best['perplexity'])}"))
            found.append(("Gap to dense closed", format_share(result["gap_closed"]), f"from {best['name']} to dense"))
        found.append((f"Zeros, {words}", format_share(result["zeros"]), "of the blocks' linear layers"))
    found.append(("Time", format_seconds(report["seconds"]), "all steps together"))
    found.append(("Peak memory", format_bytes(report["peak_memory_bytes"]), "all processes together"))
    return found


def _texts(report: dict[str, Any]) -> str:
    """What the models add to each prompt, side by side; an empty string without prompts."""
    perplexities = {result["name"]: result["perplexity"] for result in report["results"]}

    def card(name: str, text: str) -> str:
        chosen = " chosen" if name == FINAL else ""
        perplexity = f" \N{MIDDLE DOT} perplexity {format_perplexity(perplexities[name])}" if name in perplexities else ""
        return (
            f'<div class="card{chosen}"><b>{escape(name)}</b><span class="muted">{perplexity}</span>'
            f"<p>{escape(text.strip() or UNKNOWN)}</p></div>"
        )

    prompts = "".join(
        f"<h3>{escape(entry['prompt'])} \N{HORIZONTAL ELLIPSIS}</h3>\n"
        f'<div class="grid texts">{"".join(card(*text) for text in entry["texts"].items())}</div>\n'
        for entry in report["continuations"]
    )
    if not prompts:
        return ""
    return (
        "<h2>Read the difference</h2>\n"
        '<p class="muted">Each model continues the same prompt. Every token is the one that it finds most probable.</p>\n' + prompts
    )


def _speed(speed: list[dict[str, Any]]) -> str:
    """Sizes and speeds of the compressed and the dense model; an empty string if they were not measured."""
    if not speed:
        return ""
    return f"""<h2>Smaller and faster</h2>
<p class="muted">The compressed model is the final one without its zeros, with integers for its other weights. One prompt at a time.</p>
{rows_table("Speed", SPEED_COLUMNS, map(speed_cells, speed), COMPRESSED)}
"""


def _series(metrics: list[dict[str, Any]], key: str, label: str, kind: str = "train", marker: str = "small") -> Series:
    """The values of `key` in the lines of one kind."""
    lines = [line for line in metrics if line["kind"] == kind and line.get(key) is not None]
    return Series(label, [(line["iteration"], line[key]) for line in lines], marker)


def _loss(metrics: list[dict[str, Any]], key: str) -> list[Series]:
    """A term of the loss in training and in validation."""
    drawn = any("temperature" in line for line in metrics)  # else the masks are fixed
    return [
        _series(metrics, key, "training, sampled masks" if drawn else "training"),
        _series(metrics, f"{key}_sampled", "validation, sampled masks", "validation", "filled"),
        _series(metrics, f"{key}_winner", "validation, arg-max masks" if drawn else "validation", "validation", "ring"),
    ]


def _mask_charts(metrics: list[dict[str, Any]]) -> list[str]:
    """The charts of mask learning; a chart without points is an empty string."""
    shares = (
        ("mean_max_probability", "Mean maximum probability", "mean over blocks"),
        ("changed_since_prior", "Blocks that left the prior", "share of blocks"),
        ("changed_since_last", "Blocks changed since the last log", "share of blocks"),
    )
    return [
        line_chart("Loss", _loss(metrics, "loss"), x_label="iteration", y_label="nats per token"),
        *(
            line_chart(title, [_series(metrics, key, title)], x_label="iteration", y_label=y, percent=True)
            for key, title, y in shares
        ),
        *(
            line_chart(title, [_series(metrics, key, key)], x_label="iteration", y_label=key)
            for key, title in (("temperature", "Gumbel temperature"), ("scale", "Scale of the logits"))
        ),
    ]


def _weights_charts(metrics: list[dict[str, Any]]) -> list[str]:
    """The charts of the training of the weights, as `_mask_charts`. Each title is on the page once."""
    left = "Blocks that left the prior, in both trainings"
    return [
        line_chart("Divergence from the dense model", _loss(metrics, "kl"), x_label="iteration", y_label="nats per token"),
        line_chart("Cross-entropy with the text", _loss(metrics, "loss"), x_label="iteration", y_label="nats per token"),
        line_chart(
            left, [_series(metrics, "changed_since_prior", left)], x_label="iteration", y_label="share of blocks", percent=True
        ),
    ]
