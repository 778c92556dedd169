"""The recipes with MODEL=tiny: all steps run, and an interrupted training resumes on one node and on two."""

from __future__ import annotations

import dataclasses
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from maskllm.cli import main
from maskllm.huggingface.mask_file import open_mask_file
from tests.examples.scripts import ALL, DOMAIN, EXAMPLES, RECIPES, RUN, bash, dry_run, environment, reserved_port, stand_ins
from tests.ranks import Pool

pytestmark = pytest.mark.slow


@dataclass
class Run:
    """A run of a recipe in `cwd`. Its programs run in the processes of `ranks`, which have imported everything before, or in new ones."""

    recipe: str
    cwd: Path
    settings: dict[str, object]
    ranks: Pool | None = None

    @property
    def output(self) -> Path:
        return self.cwd / "outputs" / "tiny" / self.recipe

    def step(self, name: str) -> subprocess.CompletedProcess:
        settings = {"MODEL": "tiny", **self.settings}
        if self.ranks:
            (self.cwd / "programs").mkdir(exist_ok=True)
            python = self.ranks.programs(self.cwd / "programs")
            settings |= {"PATH": f"{python.parent}{os.pathsep}{environment()['PATH']}", "PYTHON": str(python)}
        done = bash(RUN, self.cwd, self.recipe, name, **settings)
        assert done.returncode == 0, done.stderr[-6000:]
        return done

    def metrics(self, kind: str) -> list[dict[str, Any]]:
        """What the training wrote at each logged iteration ("train") or at each validation ("validation")."""
        lines = map(json.loads, (self.output / "learned" / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    def interrupt(self) -> None:
        """Remove the last checkpoint of a training of six iterations, as if it had been killed after the third."""
        shutil.rmtree(self.output / "learned" / "iter_0000006")
        (self.output / "learned" / "latest_checkpointed_iteration.txt").write_text("3\n")

    def check_end(self, validation: dict[str, Any]) -> None:
        """Check that a resumed training ended with the metrics of the uninterrupted one."""
        assert (self.output / "learned" / "iter_0000006" / "manifest.json").is_file()
        assert [line["iteration"] for line in self.metrics("train")] == [1, 2, 3, 4, 5, 6]
        assert self.metrics("validation")[-1] == validation

    def check_results(self) -> None:
        """Check the reports, and the exported weights against the original ones and the mask file."""
        reports = {path.stem: json.loads(path.read_text()) for path in self.output.glob("*.json")}
        assert reports["evaluate-dense"]["zeros"] < 0.01
        assert reports["evaluate-learned"]["zeros"] == pytest.approx(0.5, abs=1e-3)
        assert np.isfinite(reports["evaluate-learned"]["perplexity"])
        assert [line["iteration"] for line in self.metrics("train")] == [1, 2, 3, 4, 5, 6]

        original = load_file(self.output / "hf-original" / "model.safetensors")
        sparse = load_file(self.output / "hf-2to4" / "model.safetensors")
        with np.load(self.output / f"{self.recipe}.mask.npz", allow_pickle=False) as masks:
            pruned = {name.removesuffix(".mask") for name in masks.files}
        assert pruned and reports["trim"]["pruned_parameters"] == sum(original[name].numel() for name in pruned)
        for name, weight in original.items():
            kept = sparse[name] != 0
            assert (sparse[name] == weight)[kept | (weight == 0)].all(), name
            share = kept.float().mean().item()
            assert share == pytest.approx(0.5, abs=0.02) if name in pruned else (sparse[name] == weight).all(), name


@pytest.fixture(scope="module")
def finished(ranks, tmp_path_factory) -> Run:
    """All steps of llama2-7b on two shards."""
    run = Run("llama2-7b", tmp_path_factory.mktemp("recipe"), {"SAVE_INTERVAL": 3}, ranks)
    run.step("all")
    return run


def test_all_steps_make_a_2to4_model(finished):
    finished.check_results()


def test_6_resume_does_nothing_after_the_last_iteration(finished):
    before = finished.metrics("train")
    assert finished.step("6_resume").stderr.endswith("nothing is left to do\n")
    assert finished.metrics("train") == before


def test_6_resume_resumes_an_interrupted_training(finished):
    validation = finished.metrics("validation")[-1]
    finished.interrupt()
    assert "resuming after iteration 3 of 6" in finished.step("6_resume").stderr
    finished.check_end(validation)


SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 2
for node in 1 2; do "${@:2}" 2> "node$node" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""


def test_a_slurm_job_resumes_the_training_on_two_nodes(finished):
    """Both nodes are this machine, each with one of the two tensor-parallel ranks, in new processes."""
    validation = finished.metrics("validation")[-1]
    finished.interrupt()
    (finished.cwd / "examples").symlink_to(EXAMPLES)
    settings = {"MODEL": "tiny", "GPUS": 1, "PATH": stand_ins(finished.cwd, srun=SRUN)} | finished.settings
    with reserved_port() as port:
        job = bash(EXAMPLES / "slurm.sbatch", finished.cwd, finished.recipe, RDZV_PORT=port, **settings)
    consoles = [(finished.cwd / f"node{node}").read_text() for node in (1, 2)]
    assert job.returncode == 0, consoles[0][-3000:] + consoles[1][-3000:]
    assert all("+ torchrun --nnodes 2 " in console for console in consoles)
    finished.check_end(validation)


def test_the_weights_are_trained_after_the_masks(finished):
    run = dataclasses.replace(finished, settings=finished.settings | {"TRAIN_WEIGHTS": "weights", "SHARDS": 0})
    for step in ("5_train_weights", "7_trim", "8_export", "9_evaluate"):
        run.step(step)
    lines = [json.loads(line) for line in (run.output / "weights" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "train" and np.isfinite(line["kl"])] == [1, 2, 3, 4, 5, 6]
    masks, weights = (load_file(run.output / name / "model.safetensors") for name in ("hf-2to4", "hf-2to4-weights"))
    moved = [name for name in masks if not (masks[name] == weights[name]).all()]
    assert any("q_proj" in name for name in moved) and not any("embed_tokens" in name for name in moved)
    for name, weight in weights.items():
        assert ((weight != 0) <= (masks[name] != 0)).all(), name
    assert json.loads((run.output / "evaluate-weights.json").read_text())["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert run.step("6_resume").stderr.endswith("iteration 6 of 6: nothing is left to do\n")


def test_cast_makes_a_2to4_model_of_the_dense_one(finished, ranks, tmp_path):
    settings = {
        "TRAIN_WEIGHTS": "cast",
        "SHARDS": 0,
        "HF_MODEL": finished.output / "hf-original",
        "DATA_DIR": finished.output / "data",
    }
    run = Run("llama2-7b", tmp_path, settings | {"EVAL_DATA": finished.output / "data" / "held_out.txt"}, ranks)
    for step in ("2_preprocess", "3_convert", "5_train_weights", "7_trim", "8_export", "9_evaluate"):
        run.step(step)
    assert json.loads((run.output / "evaluate-weights.json").read_text())["zeros"] == pytest.approx(0.5, abs=1e-3)


def test_a_domains_mask_starts_from_the_general_one(finished, ranks, tmp_path):
    settings = {
        "HF_MODEL": finished.output / "hf-original",
        "DATA_DIR": finished.output / "data",
        "TRAIN_FILES": next((finished.output / "data" / "c4" / "en").glob("*.json.gz")),
        "EVAL_DATA": finished.output / "data" / "held_out.txt",
        "PRIOR_MASK": finished.output / "llama2-7b.mask.npz",
    }
    run = Run(DOMAIN, tmp_path, settings, ranks)
    for step in ALL[1:]:
        run.step(step)
    report = json.loads((run.output / "prior.json").read_text())
    assert (report["method"], report["mask_file"]["name"]) == ("mask-file", "llama2-7b.mask.npz")
    masks = open_mask_file(run.output / f"{DOMAIN}.mask.npz", settings["PRIOR_MASK"])
    sparse = load_file(run.output / "hf-2to4" / "model.safetensors")
    for name in masks.names:
        assert ((sparse[name] != 0) <= masks.mask(name, tuple(sparse[name].shape))).all()


@pytest.mark.parametrize("recipe", ["nemotron4-15b", "gpt3-2b"])
def test_all_steps_run_for_other_families(recipe, ranks, tmp_path):
    run = Run(recipe, tmp_path, {"SHARDS": 0}, ranks)
    run.step("all")
    run.check_results()


@pytest.mark.parametrize(
    ("recipe", "family", "rope_type"),
    [
        ("llama2-13b", "llama", "default"),
        ("llama3-8b", "llama", "default"),
        ("llama3.1-8b", "llama", "llama3"),
        ("gpt3-843m", "gpt2", None),
    ],
)
def test_the_other_recipes_make_and_convert_their_tiny_model(recipe, family, rope_type, tmp_path, monkeypatch):
    """The printed commands, run in this process."""
    monkeypatch.chdir(tmp_path)
    (download,) = dry_run(recipe, "1_download", tmp_path, MODEL="tiny")
    monkeypatch.setattr(sys, "argv", download[1:])
    runpy.run_path(download[1], run_name="__main__")
    (convert,) = dry_run(recipe, "3_convert", tmp_path, MODEL="tiny")
    assert main(convert[1:]) == 0
    output = tmp_path / "outputs" / "tiny" / recipe
    config = AutoConfig.from_pretrained(output / "hf-original")
    assert config.model_type == family
    assert getattr(config, "rope_parameters", {"rope_type": None})["rope_type"] == rope_type
    assert (output / "dense" / "latest_checkpointed_iteration.txt").is_file()


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_steps_run_in_new_processes(recipe, tmp_path):
    run = Run(recipe, tmp_path, {"SHARDS": 0, "SAVE_INTERVAL": 3})
    run.step("all")
    run.check_results()
    validation = run.metrics("validation")[-1]
    run.interrupt()
    run.step("6_resume")
    run.check_end(validation)
