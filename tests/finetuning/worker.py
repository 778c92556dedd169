"""Sparse trainings of tiny models, in this process or in the ranks of a job.

usage: python -m tests.finetuning.worker SETTINGS.json     rank 0 writes each run's results to SETTINGS.json.NAME.pt
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import DistributedType, PartialState
from torch.distributed.tensor import Shard

from maskllm.finetuning import SparseTrainer, SparseTrainingArguments
from maskllm.huggingface import sparsify
from maskllm.huggingface.sparse_model import masked_parameters
from maskllm.pruning import PruneSettings, prune_hf
from tests.finetuning.tiny import batches, samples, tiny_model
from tests.ranks import Pool

LOGGED = ("loss", "cross_entropy", "kl", "squarehead", "regularizer", "mean_max_probability", "grad_norm", "weights_grad_norm")


def trainer(folder: Path, *, model: str = "llama", train: str = "masks", steps: int = 4, **changes: Any) -> SparseTrainer:
    """A trainer of a tiny model, with all terms of the loss; `changes` are those of the arguments."""
    student = tiny_model(model)
    teacher = copy.deepcopy(student)
    if train == "weights":
        prune_hf(student, batches(samples(model, 2, padded=False)), PruneSettings("magnitude"))
    sparsify(student, "2:4", train=train, seed=5)
    settings = {
        "max_steps": steps, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 1e-2, "weights_learning_rate": 1e-3, "kl_loss_coeff": 1.0, "squarehead_loss_coeff": 0.5, "weight_reg": 1e-3,
        "gumbel_temperature_range": [2.0, 0.5],
    }  # fmt: skip
    arguments = SparseTrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **(settings | changes)
    )
    if arguments.fsdp:
        shard_on_cpus()
    data = samples(model, 16)
    return SparseTrainer(student, arguments, train_dataset=data, teacher=None if train == "masks" else teacher)


def shard_on_cpus() -> None:
    """Have accelerate apply FSDP in this job, in which it would ignore it: it does so on GPUs only. Call this before it looks."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def lines(run: SparseTrainer) -> list[dict[str, float]]:
    """The numbers that a run has logged of each step."""
    return [{name: line[name] for name in LOGGED if name in line} for line in run.state.log_history if "loss" in line]


def results(run: SparseTrainer) -> dict[str, Any]:
    """What a run has logged, and the finished model's tensors and masks."""
    logged = lines(run)
    loss = run.evaluate(samples(run.model.config.model_type, 4))["eval_loss"]
    plain, masks = run.finish()
    return {"lines": logged, "eval_loss": loss, "tensors": dict(plain.state_dict()), "masks": masks}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two `results` are the same to rounding, and their masks to the bit. What `expected` has not logged may differ."""
    for ours, theirs in zip(found["lines"], expected["lines"], strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=2e-5)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=2e-5)
    assert found["masks"].keys() == expected["masks"].keys()
    for name, tensor in expected["tensors"].items():
        torch.testing.assert_close(
            found["tensors"][name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, mask in expected["masks"].items():
        assert torch.equal(found["masks"][name], mask), name
        assert not found["tensors"][name][~mask].any(), name


def on_two_processes(ranks: Pool, folder: Path, settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The `results` of runs on two processes, by name; `settings` are the arguments of `trainer`, without accumulation."""
    path = folder / "settings.json"
    path.write_text(json.dumps({name: one | {"gradient_accumulation_steps": 1} for name, one in settings.items()}))
    ranks(2, "tests.finetuning.worker", path)
    return {name: torch.load(f"{path}.{name}.pt", weights_only=True) for name in settings}


def main(path: str) -> None:
    """Do the runs of a JSON file, which maps names to the arguments of `trainer`."""
    for name, settings in json.loads(Path(path).read_text()).items():
        run = trainer(Path(f"{path}.{name}"), **settings)
        run.train()
        if "fsdp" in settings:
            for parameter in masked_parameters(run.model).values():
                assert parameter.weight.placements == (Shard(0),)
                assert parameter.logits is None or parameter.logits.placements == (Shard(0),)
        found = results(run)
        if run.args.save_strategy != "no":
            again = trainer(Path(f"{path}.{name}"), **settings)
            again.train(resume_from_checkpoint=f"{path}.{name}/checkpoint-{run.args.save_steps}")
            resumed = results(again)
            assert resumed["lines"][run.args.save_steps :] == found["lines"][run.args.save_steps :]
            assert all(torch.equal(resumed["tensors"][key], tensor) for key, tensor in found["tensors"].items())
        if run.is_world_process_zero():
            torch.save(found, f"{path}.{name}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
