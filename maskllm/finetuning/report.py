"""The result of a fine-tuning: a table for the terminal, `report.json` for programs and `report.html` for people."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from maskllm.finetuning.record import RunRecord
from maskllm.finetuning.settings import FinetuneSettings
from maskllm.finetuning.task import Task
from maskllm.reporting.files import only_finite, write_report_files
from maskllm.reporting.formatting import UNKNOWN, format_bytes, format_perplexity, format_seconds, format_share, text_table

DENSE = "dense"
ONE_SHOT = "one-shot"
"""The model that is pruned to the last sparsity at once, before any training."""
TRAINED = "trained"

SHOWN_EXAMPLES = 5
SHARES = ("wer", "cer")
"""Measures that are shown as percentages."""
TITLES = {"perplexity": "perplexity", "bleu": "BLEU", "chrf": "chrF", "wer": "word error rate", "cer": "character error rate"}
TERMS = (
    ("loss", "Loss"),
    ("cross_entropy", "Cross-entropy"),
    ("kl", "Divergence from the teacher"),
    ("squarehead", "SquareHead"),
    ("mean_max_probability", "Mean maximum probability"),
    ("learning_rate", "Learning rate"),
)
"""The charts: a key of the log, and a title."""


@dataclass(frozen=True)
class Result:
    """A model that was measured."""

    name: str
    evaluation: dict[str, Any]
    """`measures` by name, the share of `zeros` in the blocks' linears, and `outputs`: source, reference and prediction."""
    stages: list[str]
    """The stages that made it."""


def build_report(
    settings: FinetuneSettings,
    task: Task,
    results: Sequence[Result],
    record: RunRecord,
    logs: list[dict[str, Any]],
    counts: dict[str, int],
    training: dict[str, Any],
    weights_sha256: str | None,
) -> dict[str, Any]:
    """The contents of `report.json`, JSON values.

    `dense`, `one_shot` and `trained` are the measures of these models by name, and `measure` names the task's own. `results` has all
    models in order, each with `to_dense`: what its measure is divided by the dense model's, minus 1.

    Args:
        record: seconds and peak memory of each stage. On a CPU the peak is the process's, so it counts the stages before too.
        logs: the lines of the trainings' logs.
        counts: how many examples there are to train on, and to measure on.
        training: what the settings leave to the machine.
        weights_sha256: the hash of the trained model's weights (`maskllm.huggingface.weights_hash`), if its directory states it.
    """
    main, stages = task.measure_name, record.stages
    dense = results[0].evaluation["measures"][main]
    entries = []
    for result in results:
        measured, made = result.evaluation["measures"], [stages[name] for name in result.stages if name in stages]
        entries.append(
            {
                "name": result.name,
                "measures": measured,
                "to_dense": measured[main] / dense - 1 if dense and measured[main] is not None else None,
                "zeros": result.evaluation["zeros"],
                "seconds": sum(stage["seconds"] for stage in made) if made else None,
                "peak_memory_bytes": max((stage["peak_memory_bytes"] for stage in made), default=None),
            }
        )
    by_name = {entry["name"]: entry["measures"] for entry in entries}
    outputs = [result.evaluation["outputs"][:SHOWN_EXAMPLES] for result in results]
    return only_finite(
        {
            "model": settings.model,
            "task": settings.task,
            "sparsity": settings.pattern or settings.targets or [0],
            "measure": main,
            "higher_is_better": task.higher_is_better,
            **{
                key: by_name[name]
                for key, name in (("dense", DENSE), ("one_shot", ONE_SHOT), ("trained", TRAINED))
                if name in by_name
            },
            "results": entries,
            "examples": [
                {
                    **{key: texts[0][key] for key in ("source", "reference") if key in texts[0]},
                    "predictions": {result.name: text["prediction"] for result, text in zip(results, texts, strict=True)},
                }
                for texts in zip(*outputs, strict=True)
            ],
            "evaluation": {"data": list(settings.eval_data or settings.data), **counts, **task.describe()},
            "settings": asdict(settings) | training,
            "seconds": sum(stage["seconds"] for stage in stages.values()),
            "stages": [{"name": name, **stage} for name, stage in stages.items()],
            "log": logs,
            "weights_sha256": weights_sha256,
            "command": shlex.join(["maskllm", *sys.argv[1:]]),
            "commit": record.commit,
            "machine": record.machine,
        }
    )


def results_table(report: dict[str, Any]) -> str:
    """The models as aligned plain text, one a line, without a final newline."""
    return text_table(_header(report), [_cells(report, result) for result in report["results"]])


def write_report(report: dict[str, Any], directory: str | os.PathLike) -> None:
    """Write `report.json` and `report.html` into `directory`. Both hold the same; the page needs no other file."""
    write_report_files(report, _page(report), directory)


def _header(report: dict[str, Any]) -> tuple[str, ...]:
    return ("model", *(TITLES[name] for name in report["dense"]), "to dense", "zeros", "time", "peak memory")


def _cells(report: dict[str, Any], result: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["name"],
        *(_value(name, result["measures"][name]) for name in report["dense"]),
        _change(result) if result["name"] != DENSE else UNKNOWN,
        format_share(result["zeros"]),
        format_seconds(result["seconds"]),
        format_bytes(result["peak_memory_bytes"]),
    )


def _value(name: str, value: float | None) -> str:
    if name in SHARES:
        return format_share(value)
    return "inf" if value is None else format_perplexity(value)


def _change(result: dict[str, Any]) -> str:
    return UNKNOWN if result["to_dense"] is None else f"{100 * result['to_dense']:+.1f}%"


def _page(report: dict[str, Any]) -> str:
    # They need matplotlib, which only the extra `finetune` installs.
    from maskllm.reporting.page import charts_section, document, pairs, rows_table, steps_table, tiles

    sparsity = report["sparsity"]
    how = sparsity if isinstance(sparsity, str) else ", ".join(f"{100 * share:g} %" for share in sparsity) + " zeros"
    better = "higher" if report["higher_is_better"] else "lower"
    evaluation = {key: value for key, value in report["evaluation"].items() if value is not None}
    return document(
        f"{report['model']}, {report['task']}: {how}",
        f"{TITLES[report['measure']]} ({better} is better) on {evaluation['examples']} examples.",
        f"""{tiles(_headlines(report))}
<h2>Models</h2>
{rows_table("Models", _header(report), [_cells(report, result) for result in report["results"]], TRAINED)}
<p class="muted">To dense: the difference of the first measure, as a share of the dense model's. Zeros: the share of zeros in the
blocks' linear layers. Time and peak memory: for pruning and training, of the first process; on a CPU the peak since it began.</p>
{_examples(report)}{charts_section("Training", _charts(report["log"]))}
<h2>Stages</h2>
{steps_table(report["stages"])}
<h2>How it was made</h2>
{pairs({"Evaluation": evaluation, "Settings": report["settings"], "Machine": report["machine"] | {"commit": report["commit"]}})}
<p class="muted">{escape(report["command"])}</p>""",
    )


def _headlines(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    results = {result["name"]: result for result in report["results"]}
    measure = report["measure"]
    found = [
        (f"{TITLES[measure]}, {name}", _value(measure, results[name]["measures"][measure]), f"{_change(results[name])} to dense")
        for name in (TRAINED, ONE_SHOT)
        if name in results
    ]
    found.append((f"{TITLES[measure]}, dense", _value(measure, results[DENSE]["measures"][measure]), report["model"]))
    found.append(("Zeros", format_share(results[TRAINED]["zeros"]), "of the blocks' linear layers"))
    found.append(("Time", format_seconds(report["seconds"]), "all stages together"))
    return found


def _charts(log: list[dict[str, Any]]) -> list[str]:
    """A chart without points is an empty string. The steps of the trainings of a schedule follow each other."""
    from maskllm.reporting.charts import Series, line_chart

    points: dict[str, list[tuple[float, float]]] = {}
    before = last = 0
    for line in log:
        if line["step"] < last:
            before += last
        last = line["step"]
        for key, _ in TERMS:
            if line.get(key) is not None:
                points.setdefault(key, []).append((before + last, line[key]))
    return [
        line_chart(title, [Series(title, points.get(key, []))], x_label="step", y_label=key.replace("_", " "))
        for key, title in TERMS
    ]


def _examples(report: dict[str, Any]) -> str:
    """What the models wrote, side by side; an empty string for a task without texts."""

    def card(name: str, text: str) -> str:
        chosen = " chosen" if name == TRAINED else ""
        return f'<div class="card{chosen}"><b>{escape(name)}</b><p>{escape(text or UNKNOWN)}</p></div>'

    found = "".join(
        f"<h3>{escape(entry.get('source', entry['reference']))}</h3>\n"
        f'<div class="grid texts">{card("wanted", entry["reference"])}'
        f"{''.join(card(*text) for text in entry['predictions'].items())}</div>\n"
        for entry in report["examples"]
    )
    return f"<h2>Read the difference</h2>\n{found}" if found else ""
