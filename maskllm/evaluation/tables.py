"""Zero-shot results as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from maskllm.evaluation.comparison import Comparison, accuracy
from maskllm.evaluation.lm_eval_tasks import Row
from maskllm.evaluation.zero_shot import ModelScores, Score
from maskllm.markdown import markdown_table

_PERCENT = ("acc", "acc_norm")


def model_lines(models: Sequence[ModelScores]) -> list[str]:
    """What each model is, one line each."""
    lines = []
    for scores in models:
        mask = f" with the masks of {scores.mask} (sha256 {scores.mask_sha256[:16]})" if scores.mask else ""
        weights = f"weights {scores.weights_sha256[:16]}" if scores.weights_sha256 else "weights not hashed (no safetensors)"
        lines.append(
            f"{scores.label}: {scores.model}{mask}; {weights}; {scores.zeros:.1%} zeros; {scores.dtype} on {scores.device}; "
            f"window {scores.window}; {scores.bos}; batch size {scores.batch_size}; {scores.seconds:.1f} s"
        )
    return lines


def score_table(models: Sequence[ModelScores], rows: Sequence[Row]) -> list[str]:
    """Each line's metrics, one column a model. Accuracies are in percent, with standard errors."""
    cells = []
    for row in rows:
        if row.kind == "mean":
            means = [accuracy(scores, row) for scores in models]
            if None not in means:
                cells.append([row.name, "acc", "", "", *(_shown("acc", score) for score in means)])
            continue
        first = models[0].tasks[row.name]
        for metric in first.metrics:
            shots = "" if first.shots is None else str(first.shots)
            cells.append(
                [
                    row.name,
                    metric,
                    shots,
                    str(first.items),
                    *(_shown(metric, scores.tasks[row.name].metrics[metric]) for scores in models),
                ]
            )
    return markdown_table(["task", "metric", "shots", "items", *(scores.label for scores in models)], cells, left=2)


def comparison_table(reference: str, found: Sequence[tuple[str, Sequence[Comparison]]]) -> list[str]:
    """The acc of every other model, by its label, against the one with the label `reference`. Differences are in percent points."""
    cells = [
        [
            item.row,
            label,
            f"{100 * item.difference:+.2f}" + ("" if item.stderr is None else f" ± {100 * item.stderr:.2f}"),
            f"{item.gained} / {item.lost}",
            "" if item.p_value is None else f"{item.p_value:.2g}",
            "" if item.recovered is None else f"{item.recovered:.1%}",
        ]
        for label, comparisons in found
        for item in comparisons
    ]
    return markdown_table(["task", "model", f"acc minus {reference}", "gained / lost", "p", "recovered"], cells, left=2)


def truncation_lines(models: Sequence[ModelScores], rows: Sequence[Row]) -> list[str]:
    """One line for each task and model with prompts that were cut."""
    return [
        f"{scores.label}: {row.name}: {scores.tasks[row.name].truncated} of {scores.tasks[row.name].items} items are longer than "
        f"the window of {scores.window} tokens; lm-eval cut their prompts on the left"
        for scores in models
        for row in rows
        if row.kind != "mean" and scores.tasks[row.name].truncated
    ]


def _shown(metric: str, score: Score) -> str:
    scale, digits = (100, 2) if metric in _PERCENT else (1, 4)
    error = "" if score.stderr is None else f" ± {scale * score.stderr:.{digits}f}"
    return f"{scale * score.value:.{digits}f}{error}"
