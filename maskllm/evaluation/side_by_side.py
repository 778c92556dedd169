"""Zero-shot tasks on one or several models: the report that `maskllm evaluate --tasks` prints and writes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskllm.environment.revision import running_code
from maskllm.evaluation.candidates import Candidate
from maskllm.evaluation.comparison import Comparison, accuracy, compare
from maskllm.evaluation.lm_eval_tasks import Row, load_suite
from maskllm.evaluation.tables import comparison_table, model_lines, score_table, truncation_lines
from maskllm.evaluation.task_files import TaskFile
from maskllm.evaluation.task_sets import expand
from maskllm.evaluation.zero_shot import PACKAGES, ModelScores, evaluate_tasks


@dataclass(frozen=True)
class ZeroShotReport:
    """Models side by side. The first one is the reference of the others."""

    models: tuple[ModelScores, ...]
    rows: tuple[Row, ...]
    files: dict[str, TaskFile]
    limit: int | None
    versions: dict[str, str | None]

    def comparisons(self) -> list[tuple[ModelScores, list[Comparison]]]:
        """Every model but the first, compared with the first."""
        return [(scores, compare(self.models[0], scores, self.rows)) for scores in self.models[1:]]

    def lines(self) -> list[str]:
        """The report as text: the models, and tables in Markdown."""
        code = ", ".join(f"{name} {version}" for name, version in self.versions.items() if version)
        lines = [*model_lines(self.models), code, ""]
        lines += score_table(self.models, self.rows)
        lines += ["", "acc and acc_norm in percent ± standard error. The papers' tables print acc."]
        if self.limit:
            lines.append(f"The first {self.limit} items of each task only.")
        lines += truncation_lines(self.models, self.rows)
        if compared := self.comparisons():
            lines += ["", *comparison_table(self.models[0].label, [(scores.label, found) for scores, found in compared]), ""]
            lines.append(
                f"recovered: acc as a share of {self.models[0].label}'s. gained / lost: items that only this model, or only "
                f"{self.models[0].label}, answers right. p: of no difference, by McNemar's exact test for a task and a paired normal "
                "test for a mean."
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        compared = {scores.label: list(map(dataclasses.asdict, found)) for scores, found in self.comparisons()}
        models = []
        for scores in self.models:
            means = {row.name: accuracy(scores, row) for row in self.rows if row.kind == "mean"}
            values = dataclasses.asdict(scores)
            del values["correct"]
            values["means"] = {name: dataclasses.asdict(score) for name, score in means.items() if score is not None}
            values["against_reference"] = compared.get(scores.label)
            models.append(values)
        return {
            "versions": self.versions,
            "limit": self.limit,
            "reference": self.models[0].label,
            "files": {name: dataclasses.asdict(file) for name, file in self.files.items()},
            "models": models,
        }


@contextlib.contextmanager
def zero_shot_report(
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    *,
    data: str | os.PathLike | None = None,
    limit: int | None = None,
    batch_size: int | str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Iterator[ZeroShotReport]:
    """A block with the report of the candidates on the tasks. The answers stay on disk until the block ends without an error.

    Args:
        tasks: names of sets (`maskllm.evaluation.task_sets`), or of tasks, groups and tags of lm-eval.
        data: the folder with local tasks (`maskllm.evaluation.task_files`); None to take the data from the hub or its cache.
        limit, batch_size, dtype, device, trust_remote_code: as in `evaluate_tasks`.

    Raises MaskLLMError as `load_suite` and `evaluate_tasks` do.
    """
    caches: list[Path] = []
    code = running_code(PACKAGES)
    with tempfile.TemporaryDirectory(prefix="maskllm-tasks-") as scratch:
        suite = load_suite(expand(tasks), None if data is None else Path(data), limit, Path(scratch))
        scores = tuple(
            evaluate_tasks(
                candidate,
                suite,
                limit=limit,
                batch_size=batch_size,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
                caches=caches,
            )
            for candidate in candidates
        )
    yield ZeroShotReport(scores, suite.rows, suite.files, limit, code)
    for cache in caches:
        cache.unlink(missing_ok=True)
