"""Damaged stored matrices: each is refused by name, or expanded and multiplied as the reference does (benchmarks/sparse_fuzz.py)."""

import importlib.util
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sparse_fuzz.py"


def test_damaged_matrices_are_refused_or_right(instruction_set):
    spec = importlib.util.spec_from_file_location("sparse_fuzz", SCRIPT)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    found = Counter()
    for case in range(200):
        torch.manual_seed(case)
        found[fuzz.one_case(random.Random(case))] += 1
    assert min(found["refused"], found["refused file"], found["passed"]) > 10


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_damaged_matrices_under_address_sanitizer():
    command = [sys.executable, str(SCRIPT), "--cases", "2000"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "2000 cases" in result.stdout
