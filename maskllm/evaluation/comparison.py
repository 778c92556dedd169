"""How a model differs from the first one on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm

from maskllm.evaluation.lm_eval_tasks import Row
from maskllm.evaluation.zero_shot import ModelScores, Score


@dataclass(frozen=True)
class Comparison:
    """The acc of a model minus that of the reference, on one line of the result."""

    row: str
    difference: float
    stderr: float | None
    """The standard error of the difference over pairs of answers to one item; None for a task with one item."""
    gained: int
    """Items that only this model answers right."""
    lost: int
    """Items that only the reference answers right."""
    p_value: float | None
    test: str
    """"McNemar, exact" for a task, "paired, normal" for a group or a mean."""
    recovered: float | None
    """This model's acc as a share of the reference's; None if that is 0."""


def accuracy(scores: ModelScores, row: Row) -> Score | None:
    """The acc of a line: lm-eval's own for a task and a group; for a mean, the mean of its members. None if one has no acc.

    The standard error of a mean of K members is the root of the sum of their squared standard errors, divided by K.
    """
    if row.kind != "mean":
        return scores.tasks[row.name].metrics.get("acc")
    parts = [scores.tasks[name].metrics.get("acc") for name in row.members]
    if any(part is None for part in parts):
        return None
    errors = [part.stderr for part in parts]
    stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(parts)
    return Score(sum(part.value for part in parts) / len(parts), stderr)


def compare(reference: ModelScores, model: ModelScores, rows: Sequence[Row]) -> list[Comparison]:
    """One comparison for each line that has an acc.

    For a task, McNemar's exact test asks whether gained and lost items are equally likely (a binomial test). For a line of several
    tasks, the difference is divided by its standard error and compared with the normal distribution. The items of each task are a
    sample of their own.
    """
    found = []
    for row in rows:
        before, after = accuracy(reference, row), accuracy(model, row)
        if before is None or after is None or not all(leaf in model.correct for leaf in row.weights):
            continue
        changes = {leaf: model.correct[leaf] - reference.correct[leaf] for leaf in row.weights}
        gained = sum(int((change > 0).sum()) for change in changes.values())
        lost = sum(int((change < 0).sum()) for change in changes.values())
        stderr = _stderr(row, changes)
        difference = after.value - before.value
        if row.kind == "task":
            p_value, test = (binomtest(gained, gained + lost).pvalue if gained + lost else 1.0), "McNemar, exact"
        elif stderr is None:
            p_value, test = None, "paired, normal"
        else:
            p_value, test = (2 * norm.sf(abs(difference) / stderr) if stderr else float(difference == 0)), "paired, normal"
        recovered = after.value / before.value if before.value else None
        found.append(
            Comparison(row.name, difference, stderr, gained, lost, None if p_value is None else float(p_value), test, recovered)
        )
    return found


def _stderr(row: Row, changes: dict[str, np.ndarray]) -> float | None:
    if any(len(change) < 2 for change in changes.values()):
        return None
    return math.sqrt(sum(row.weights[leaf] ** 2 * change.var(ddof=1) / len(change) for leaf, change in changes.items()))
