"""The benchmark of killing and resuming, a few cycles of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, BENCHMARK, "--cycles", "3", "--train-iters", "20", "--json", report]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(report.read_text())
    assert found["tensors_that_differ"] == []
    assert found["tensors_in_each"] > 8
    assert len(found["history"]) == 3
    assert found["runs_compared"] >= 1
