"""The launch scripts with MODEL=tiny: all of them run, for every recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.examples.scripts import EXAMPLES, RECIPES, bash, environment, port_of_ours


@pytest.fixture
def warm_programs(ranks, tmp_path_factory) -> dict[str, str]:
    """The environment in which the programs that the scripts call run in processes that have imported everything before."""
    python = ranks.programs(tmp_path_factory.mktemp("programs"))
    return {"PATH": f"{python.parent}{os.pathsep}{environment()['PATH']}", "PYTHON": str(python)}


def metrics(output: Path, kind: str) -> list[dict[str, Any]]:
    """What a recipe's training has written."""
    lines = map(json.loads, (output / "learned" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def interrupt(output: Path) -> None:
    """Leave a training of six steps as if it had been killed after the checkpoint in the middle."""
    shutil.rmtree(output / "learned" / "iter_0000006")
    (output / "learned" / "latest_checkpointed_iteration.txt").write_text("3\n")


def check_end(output: Path, validation: dict[str, Any]) -> None:
    """Check that a run that goes on has ended where the one before had."""
    assert (output / "learned" / "iter_0000006" / "manifest.json").is_file()
    assert [line["iteration"] for line in metrics(output, "train")] == [1, 2, 3, 4, 5, 6]
    assert metrics(output, "validation")[-1] == validation


def train_on_two_nodes(recipe: str, cwd: Path, **settings: object) -> None:
    """Start step 5 twice, as if on two machines with one process each, and wait for its end."""
    command = ["bash", EXAMPLES / recipe / "5_train_multinode.sh"]
    with port_of_ours() as port:
        variables = environment(RDZV_ENDPOINT=f"localhost:{port}", GPUS=1, **settings)
        nodes = [subprocess.Popen(command, cwd=cwd, env=variables, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        try:
            messages = [node.communicate(timeout=900)[1] for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    assert [node.returncode for node in nodes] == [0, 0], messages[0][-3000:] + messages[1][-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["warm", pytest.param("cold", marks=pytest.mark.long)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tiny_model_goes_all_the_way(recipe, start, warm_programs, tmp_path):
    """The first recipe on two shards; a cold start is of the programs themselves.

    Then the training is interrupted in the middle, twice: step 6 and two nodes go on to where it had ended.
    """
    tiny = {"MODEL": "tiny", "SAVE_INTERVAL": 3} | ({} if recipe == RECIPES[0] else {"SHARDS": 0})
    settings = tiny | (warm_programs if start == "warm" else {})
    done = bash(EXAMPLES / recipe / "run_all.sh", tmp_path, **settings)
    assert done.returncode == 0, done.stderr[-6000:]
    output = tmp_path / "outputs" / "tiny" / recipe
    reports = {path.stem: json.loads(path.read_text()) for path in output.glob("*.json")}
    assert reports["evaluate-dense"]["zeros"] < 0.01
    assert reports["evaluate-learned"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert np.isfinite(reports["evaluate-learned"]["perplexity"])
    assert [line["iteration"] for line in metrics(output, "train")] == [1, 2, 3, 4, 5, 6]
    validation = metrics(output, "validation")[-1]

    original, sparse = load_file(output / "hf-original" / "model.safetensors"), load_file(output / "hf-2to4" / "model.safetensors")
    with np.load(output / f"{recipe}.mask.npz", allow_pickle=False) as masks:
        pruned = {name.removesuffix(".mask") for name in masks.files}
    assert pruned and reports["trim"]["pruned_parameters"] == sum(original[name].numel() for name in pruned)
    for name, weight in original.items():
        kept = sparse[name] != 0
        assert (sparse[name] == weight)[kept | (weight == 0)].all(), name
        share = kept.float().mean().item()
        assert share == pytest.approx(0.5, abs=0.02) if name in pruned else (sparse[name] == weight).all(), name

    resume = EXAMPLES / recipe / "6_resume.sh"
    assert bash(resume, tmp_path, **settings).stderr.endswith("nothing is left to do\n")
    interrupt(output)
    done = bash(resume, tmp_path, **settings)
    assert done.returncode == 0, done.stderr[-6000:]
    assert "going on after iteration 3 of 6" in done.stderr
    check_end(output, validation)
    interrupt(output)
    train_on_two_nodes(recipe, tmp_path, **tiny)
    check_end(output, validation)
