"""The benchmark that kills and resumes a run at random moments (benchmarks/kill_resume.py), with a few cycles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kill_resume, tables
from benchmarks.results import Result
from maskllm.checkpoints.reading import resolve
from tests.ranks import Job


def check(report: dict[str, Any], cycles: int) -> None:
    assert report["tensors_that_differ"] == []
    assert report["tensors_in_each"] > 8
    assert len(report["history"]) == cycles
    assert report["runs_compared"] >= 1
    lines = tables.kill_resume({"kill-resume": Result(report, None, None, None, {}, None, None, None)})
    assert sum(line.startswith("| tensors that differ") and line.endswith(" 0 |") for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("trained", "cycles"), [("masks", 4), ("both", 2), pytest.param("weights", 2, marks=pytest.mark.long)])
def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(trained, cycles, ranks, tmp_path, monkeypatch):
    """The ranks are forked from the server of tests.ranks instead of started by torchrun."""

    def start(words: list[str], log: Path) -> Job:
        with log.open("a") as file:
            return ranks.start(2, words[words.index("maskllm.train") - 1 :], [file.fileno()] * 2)

    monkeypatch.setattr(kill_resume, "start", start)
    report = kill_resume.measure(cycles=cycles, steps=12, ranks=2, seed=1234, trained=trained, folder=tmp_path)
    check(report, cycles)
    masters = any(key.startswith("optimizer.state.fp32_param.") for key in resolve(tmp_path / "whole").tensors)
    assert masters == (trained != "masks")


@pytest.mark.long
def test_the_benchmark_under_torchrun(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, kill_resume.__file__, "--cycles", "3", "--train-iters", "20", "--json", report]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    check(json.loads(report.read_text()), 3)
