"""Two processes give the run of one: the same masks from the same seed, and losses equal to rounding."""

from __future__ import annotations

import json

import pytest
import torch

from tests.finetuning.worker import assert_same, results, trainer

RUNS = {
    "masks": {"train": "masks"},
    "weights": {"train": "weights"},
    "t5": {"model": "t5", "train": "weights"},
    "both": {"train": "both"},
}
STEPS = 3
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
CHECKPOINTING = {"fsdp_config": FSDP2["fsdp_config"] | {"activation_checkpointing": True}}
ENGINES = {
    "ddp": {"masks": {}, "t5": {}},
    # The second one is also resumed in the worker.
    "fsdp2": {"weights": FSDP2, "both": FSDP2 | CHECKPOINTING | {"save_strategy": "steps", "save_steps": 1}},
}
"""Settings of an engine's runs."""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, ranks):
    """The results of the runs on two processes, by engine and name."""
    path = tmp_path_factory.mktemp("ranks") / "settings.json"
    settings = {
        f"{engine}_{name}": RUNS[name] | more | {"steps": STEPS, "gradient_accumulation_steps": 1}
        for engine, runs in ENGINES.items()
        for name, more in runs.items()
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
    assert len({json.dumps(line) for line in expected["lines"]}) == STEPS, "the steps cannot be told apart"
    for engine in (engine for engine, runs in ENGINES.items() if name in runs):
        assert_same(two_processes[f"{engine}_{name}"], expected)
