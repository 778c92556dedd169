"""Other patterns than 2:4, and hard masks: learned, trimmed and exported, with exactly N of M kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskllm import train
from maskllm.cli import main

pytestmark = pytest.mark.usefixtures("signal_handlers")


def run(verb: str, *arguments: object) -> None:
    assert main([verb, *map(str, arguments)]) == 0


@pytest.mark.parametrize(
    ("pattern", "flags"), [("1:4", ()), ("2:16", ()), ("2:4", ("--hard",))], ids=["1:4", "2:16 (120 candidates)", "2:4 hard"]
)
def test_training_keeps_exactly_n_of_m(pattern, flags, tmp_path, tiny_hf, tiny_dense, tiny_dataset):
    run("prune", "--load", tiny_dense, "--output", tmp_path / "pruned", "--method", "magnitude", "--pattern", pattern)
    options = {
        "--data-path": tiny_dataset, "--load": tmp_path / "pruned", "--save": tmp_path / "trained", "--train-iters": 3,
        "--global-batch-size": 2, "--seq-length": 32, "--lr": 0.05, "--params-dtype": "fp32", "--eval-iters": 0, "--log-interval": 1,
        "--pattern": pattern,
    }  # fmt: skip
    assert train.main([str(part) for option in options.items() for part in option] + list(flags)) == 0
    lines = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    assert all(math.isfinite(line[key]) and line[key] > 0 for line in lines for key in ("loss", "grad_norm", "regularizer"))
    assert lines[-1]["changed_since_prior"] > 0.01, "training moved no mask"

    run("trim", "--load", tmp_path / "trained", "--output", tmp_path / "trimmed")
    run("export", "--load", tmp_path / "trimmed", "--output", tmp_path / "sparse")
    n, m = map(int, pattern.split(":"))
    before, after = load_file(Path(tiny_hf) / "model.safetensors"), load_file(tmp_path / "sparse" / "model.safetensors")
    for name, weight in before.items():
        found = after[name]
        if "_proj." not in name:
            assert torch.equal(found, weight), name
            continue
        kept = found != 0
        assert torch.equal(found[kept], weight[kept]), name
        full_blocks = (weight != 0).view(-1, m).all(1)
        assert full_blocks.float().mean() > 0.9, name
        assert (kept.view(-1, m).sum(1)[full_blocks] == n).all(), name
