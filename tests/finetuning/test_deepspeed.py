"""DeepSpeed's ZeRO 1 and 2: two processes give the run of one, and a resumed run its bits."""

from __future__ import annotations

import pytest

from tests.finetuning.worker import assert_same, on_two_processes, results, trainer

pytest.importorskip("deepspeed")

RUNS = {
    "masks": {"train": "masks"},
    "weights": {"train": "weights"},
    "both": {"train": "both", "max_grad_norm": 1e9},  # DeepSpeed clips one norm over logits and weights
}
WHISPER = {"model": "whisper", "train": "weights", "bf16": True}
STEPS = 3


def zero(stage: int) -> dict:
    """Settings of a run, which the worker also resumes."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = {"zero_optimization": {"stage": stage}, **dict.fromkeys(names, "auto"), "bf16": {"enabled": "auto"}}
    return {"deepspeed": config, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, ranks):
    """The results of the runs on two processes, by stage and name."""
    runs = {**RUNS, "whisper": WHISPER}
    settings = {f"{stage}_{name}": run | zero(stage) | {"steps": STEPS} for stage in (1, 2) for name, run in runs.items()}
    return on_two_processes(ranks, tmp_path_factory.mktemp("deepspeed"), settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name, two_processes, tmp_path):
    alone = trainer(tmp_path, **RUNS[name], steps=STEPS)
    alone.train()
    expected = results(alone)
    for line in expected["lines"] if name == "both" else ():
        del line["grad_norm"], line["weights_grad_norm"]  # DeepSpeed logs one norm of both
    for stage in (1, 2):
        assert_same(two_processes[f"{stage}_{name}"], expected)


@pytest.mark.slow
def test_a_model_that_deepspeed_has_cast_has_a_teacher_of_its_dtype(two_processes, tmp_path):
    """Without an autocast sound in bf16 would not fit the fp32 weights of the teacher."""
    alone = trainer(tmp_path, **WHISPER, steps=STEPS)
    alone.train()
    expected = results(alone)["eval_loss"]
    for stage in (1, 2):
        assert two_processes[f"{stage}_whisper"]["eval_loss"] == pytest.approx(expected, rel=0.02)
