"""DeepSpeed's ZeRO 1 and 2: two processes give the run of one, and a resumed run its bits."""

from __future__ import annotations

import json

import pytest
import torch

from tests.finetuning.worker import results, trainer

pytest.importorskip("deepspeed")

RUNS = {
    "masks": {"train": "masks"},
    "weights": {"train": "weights"},
    "both": {"train": "both", "max_grad_norm": 1e9},  # DeepSpeed clips one norm over logits and weights
}
STEPS = 3


def zero(stage: int) -> dict:
    """Settings of a run, which the worker also resumes."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": {"stage": stage}, **dict.fromkeys(names, "auto")}
    return {"deepspeed": config, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, ranks):
    """The results of the runs on two processes, by stage and name."""
    path = tmp_path_factory.mktemp("deepspeed") / "settings.json"
    settings = {
        f"{stage}_{name}": run | zero(stage) | {"steps": STEPS, "gradient_accumulation_steps": 1}
        for stage in (1, 2)
        for name, run in RUNS.items()
    }
    path.write_text(json.dumps(settings))
    ranks(2, "tests.finetuning.worker", path)
    return {name: torch.load(f"{path}.{name}.pt", weights_only=True) for name in settings}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name, two_processes, tmp_path):
    alone = trainer(tmp_path, **RUNS[name], steps=STEPS)
    alone.train()
    expected = results(alone)
    for line in expected["lines"] if name == "both" else ():
        del line["grad_norm"], line["weights_grad_norm"]  # DeepSpeed logs one norm of both
    for stage in (1, 2):
        found = two_processes[f"{stage}_{name}"]
        for ours, theirs in zip(found["lines"], expected["lines"], strict=True):
            assert {term: ours[term] for term in theirs} == pytest.approx(theirs, rel=2e-5), stage
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=2e-5)
        assert found["masks"].keys() == expected["masks"].keys()
        for key, mask in expected["masks"].items():
            assert torch.equal(found["masks"][key], mask), stage
            assert not found["tensors"][key][~mask].any(), stage
        for key, tensor in expected["tensors"].items():
            torch.testing.assert_close(found["tensors"][key], tensor, rtol=1e-3, atol=1e-5)
