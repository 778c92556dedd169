"""The tables of README and docs, as Markdown lines from results. Each function takes the results that there are, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import Result
from maskllm.markdown import markdown_table
from maskllm.quickstart.report import RESULT_COLUMNS, result_cells
from maskllm.reporting.formatting import UNKNOWN, format_bytes, format_perplexity, format_seconds, format_share

Results = Mapping[str, Result]


def quickstart(found: Results) -> list[str]:
    """The models of a quickstart, and what all steps took."""
    report = found["quickstart"].result
    settings, evaluation = report["settings"], report["evaluation"]
    tokens = settings["train_iters"] * settings["global_batch_size"] * settings["seq_length"]
    return [
        *markdown_table(RESULT_COLUMNS, list(map(result_cells, report["results"])), left=1),
        "",
        f"The masks are learned in {settings['train_iters']} steps, {tokens:,} tokens in all; then weights and masks are trained in "
        f"{settings['weights_train_iters']} steps of the same size.",
        f"Perplexity is that of {evaluation['windows']} held-out windows of {evaluation['seq_length']} tokens.",
        f"All steps together took {format_seconds(report['seconds'])} and at most {format_bytes(report['peak_memory_bytes'])} in all "
        "processes.",
    ]


def quickstart_settings(found: Results) -> list[str]:
    """Settings of mask learning: the loss of the winning masks on the validation split."""
    cells = []
    for name in found:
        report = found[name].result
        losses = [line["loss_winner"] for line in report["metrics"] if line.get("kind") == "validation"]
        settings = report["settings"]
        cells.append([f"{settings['prior_strength']:g}", f"{settings['lr']:g}", f"{losses[-1]:.2f}"])
    return markdown_table(["prior strength", "learning rate", "validation loss"], sorted(cells), left=0)


def quickstart_trainings(found: Results) -> list[str]:
    """What the second training adds to the first."""
    cells = []
    for name in found:
        settings = found[name].result["settings"]
        models = {model["name"]: model for model in found[name].result["results"]}
        masks = f"{settings['train_iters']} steps"
        for model, then in (
            ("learned", "nothing"),
            ("final", f"{settings['weights_train']}, {settings['weights_train_iters']} steps"),
        ):
            if model in models:
                closed = format_share(models[model]["gap_closed"])
                cells.append([masks, then, format_perplexity(models[model]["perplexity"]), closed])
    unique = list(dict.fromkeys(map(tuple, cells)))
    return markdown_table(["masks", "then", "perplexity", "gap closed"], unique, left=2)


def quality(found: Results) -> list[str]:
    """The ways to train, by tokens, then by perplexity. Zero-shot columns stand there if a row has tasks."""
    rows = sorted((result.result for result in found.values()), key=lambda row: (row["tokens"], -row["perplexity"]))
    one_shot = {row["recipe"]: row["perplexity"] for row in rows if not row["rate"]}
    dense, prior = one_shot.get("dense"), one_shot.get("sparsegpt")
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"] or {}))
    cells = []
    for row in rows:
        closed = None if None in (dense, prior) else (prior - row["perplexity"]) / (prior - dense)
        scores = [_accuracy((row["tasks"] or {}).get(task)) for task in tasks]
        cells.append(
            [
                row["recipe"],
                row["rate"] or UNKNOWN,
                str(row["seed"] or UNKNOWN),
                f"{row['tokens']:,}",
                format_perplexity(row["perplexity"]),
                format_share(closed),
                *scores,
            ]
        )
    return markdown_table(
        ["recipe", "learning rate", "seed", "training tokens", "perplexity", "gap closed", *(f"{task}, acc" for task in tasks)],
        cells,
        left=1,
    )


def zero_shot(found: Results) -> list[str]:
    """Models side by side on tasks, and compared with the first one."""
    report = found["zero-shot"].result
    models = report["models"]
    tasks = list(models[0]["tasks"])
    cells = [
        [task, str(models[0]["tasks"][task]["items"]), *(_accuracy(model["tasks"][task]["metrics"].get("acc")) for model in models)]
        for task in tasks
    ]
    cells += [[name, "", *(_accuracy(model["means"][name]) for model in models)] for name in models[0]["means"]]
    compared = [
        [
            item["row"],
            model["label"],
            f"{100 * item['difference']:+.2f}" + ("" if item["stderr"] is None else f" ± {100 * item['stderr']:.2f}"),
            f"{item['gained']} / {item['lost']}",
            "" if item["p_value"] is None else f"{item['p_value']:.2g}",
            format_share(item["recovered"]),
        ]
        for model in models[1:]
        for item in model["against_reference"]
    ]
    limit = f"The first {report['limit']} items of each task only." if report["limit"] else "All items of each task."
    return [
        *markdown_table(["task", "items", *(model["label"] for model in models)], cells, left=1),
        "",
        f"`acc` in percent ± standard error, zero examples in a prompt. {limit}",
        f"lm-eval {report['versions']['lm-eval']}, {models[0]['dtype']}; weights (SHA-256) "
        + ", ".join(f"{model['label']} `{model['weights_sha256'][:16]}`" for model in models)
        + ".",
        "",
        *markdown_table(["task", "model", f"acc minus {report['reference']}", "gained / lost", "p", "recovered"], compared, left=2),
        "",
        "[evaluation.md](evaluation.md) explains the columns.",
    ]


def one_shot(found: Results) -> list[str]:
    """One-shot masks of SmolLM2 by calibration text."""
    methods = {
        "dense": "dense",
        "magnitude": "magnitude",
        "wanda": "Wanda",
        "sparsegpt": "SparseGPT, mask only",
        "sparsegpt, updated": "SparseGPT, weights updated",
    }
    rows = [found[name].result for name in found]
    cells = [
        [f"{row['samples']} x {row['seq_length']}", str(row["seed"]), *(_or_empty(row["perplexity"].get(key)) for key in methods)]
        for row in rows
    ]
    return markdown_table(["calibration tokens", "seed", *methods.values()], cells, left=1)


def _accuracy(score: Mapping[str, float | None] | None) -> str:
    """An accuracy in percent, with its standard error."""
    if score is None:
        return UNKNOWN
    error = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.1f}{error}"


def _or_empty(value: float | None) -> str:
    return "" if value is None else format_perplexity(value)


def measurement_rows(rows: Sequence[Sequence[Any]]) -> list[str]:
    """The table of all measurements in docs/results.md."""
    header = ["measurement", "date", "machine", "load", "versions", "commit", "code", "command, and what else to know"]
    return markdown_table(header, rows, left=len(header))
