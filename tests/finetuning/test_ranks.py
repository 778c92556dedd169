"""Two processes give the run of one: the same masks from the same seed, and losses equal to rounding."""

from __future__ import annotations

import json

import pytest

from tests.finetuning.worker import assert_same, on_two_processes, results, trainer

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
    settings = {
        f"{engine}_{name}": RUNS[name] | more | {"steps": STEPS} for engine, runs in ENGINES.items() for name, more in runs.items()
    }
    return on_two_processes(ranks, tmp_path_factory.mktemp("ranks"), settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name, two_processes, tmp_path):
    alone = trainer(tmp_path, **RUNS[name], steps=STEPS)
    alone.train()
    expected = results(alone)
    assert len({json.dumps(line) for line in expected["lines"]}) == STEPS, "the steps cannot be told apart"
    for engine in (engine for engine, runs in ENGINES.items() if name in runs):
        assert_same(two_processes[f"{engine}_{name}"], expected)
