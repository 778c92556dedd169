"""A report with made-up numbers that are easy to work out by hand."""

from __future__ import annotations

import pytest

from maskllm.quickstart.report import ModelResult, Report

GIB = 2**30


@pytest.fixture
def report() -> Report:
    def train(iteration: int, loss: float) -> dict:
        return {
            "kind": "train",
            "iteration": iteration,
            "loss": loss,
            "temperature": 4.0 / iteration,
            "scale": 100.0 * iteration,
            "mean_max_probability": 0.75,
            "changed_since_last": 0.01,
            "changed_since_prior": 0.001 * iteration,
        }

    return Report(
        model="SmolLM2",
        pattern="2:4",
        evaluation={"data": "held-out.jsonl", "windows": 16, "seq_length": 512, "dtype": "fp32"},
        machine={"cpu": "a processor", "cores": 2, "memory_bytes": 24 * GIB, "torch": "2.13.0"},
        settings={"train_iters": 3, "lr": 5e-4, "train_options": ["--hard"], "prior": None},
        results=[
            ModelResult("dense", 20.0, 0.0, None, None, one_shot=False),
            ModelResult("magnitude", 2020.0, 0.5, 3.2, GIB, one_shot=True),
            ModelResult("wanda", 120.0, 0.5, 61.0, 2 * GIB, one_shot=True),
            ModelResult("learned", 60.0, 0.5, 400.0, 4 * GIB, one_shot=False),
            ModelResult("final", 30.0, 0.5, 700.0, 5 * GIB, one_shot=False),
        ],
        steps=[
            {"name": "convert", "seconds": 100.0, "peak_memory_bytes": GIB},
            {"name": "train", "seconds": 400.0, "peak_memory_bytes": 4 * GIB},
            {"name": "train final", "seconds": 300.0, "peak_memory_bytes": 5 * GIB},
        ],
        metrics=[
            *(train(iteration, loss) for iteration, loss in ((1, 5.0), (2, 4.5), (3, 4.0))),
            {"kind": "validation", "iteration": 3, "loss_sampled": 4.25, "loss_winner": 4.125},
        ],
        weights_metrics=[
            *(train(iteration, loss) | {"kl": loss - 3.0} for iteration, loss in ((1, 4.0), (2, 3.5))),
            *(
                {
                    "kind": "validation",
                    "iteration": iteration,
                    "loss_sampled": 3.75,
                    "loss_winner": 3.5,
                    "kl_sampled": 0.75,
                    "kl_winner": kl,
                }
                for iteration, kl in ((1, 0.625), (2, 0.5))
            ),
        ],
        continuations=[
            {
                "prompt": "The sky is",
                "texts": {"dense": " blue.", "wanda": " a a a", "learned": " is", "final": " blue,\n\nand high"},
            },
            {"prompt": "One", "texts": {"dense": " two", "wanda": "\n", "learned": " of", "final": " two"}},
        ],
        speed=[
            {
                "model": name,
                "file_bytes": size * GIB,
                "weight_bytes": size * GIB // 2,
                "first_token_seconds": 1 / size,
                "tokens_per_second": tokens,
            }
            for name, size, tokens in (("compressed", 2, 30.04), ("dense", 5, 10.25))
        ],
    )
