"""What the steps of a quickstart leave behind, collected for its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from maskllm.environment.machine import machine
from maskllm.environment.revision import commit
from maskllm.pruning.solve import METHODS
from maskllm.quickstart.report import COMPRESSED, DENSE, FINAL, LEARNED, ModelResult, Report
from maskllm.quickstart.steps import Steps


def speed_file(output: Path) -> Path:
    """The file that `maskllm benchmark` writes of the compressed and the dense model, in this order."""
    return output / "speed.json"


def text_file(output: Path, name: str) -> Path:
    """The file with the texts of the model `name`."""
    return output / "text" / f"{name}.json"


def build_report(
    output: Path, steps: Steps, settings: dict[str, Any], model: str, data: str, prior: str, readers: list[str]
) -> Report:
    """Collect the results of the steps.

    Args:
        settings: JSON values.
        prior: the name of the one-shot mask that training started from.
        readers: the names of the models that continued the prompts.
    """
    evaluations = {name: read_json(output / "evaluation" / f"{name}.json") for name in ("dense", *METHODS, LEARNED, FINAL)}
    made_by = {method: [f"prune {method}"] for method in METHODS}
    made_by |= {"dense": [], LEARNED: ["train"], FINAL: ["train", "train final"]}
    results = [
        ModelResult(
            name=name,
            perplexity=found["perplexity"],
            zeros=found["zeros"],
            seconds=sum(steps.records[step]["seconds"] for step in made_by[name]) if made_by[name] else None,
            peak_memory_bytes=max((steps.records[step]["peak_memory_bytes"] for step in made_by[name]), default=None),
            one_shot=name in METHODS,
        )
        for name, found in evaluations.items()
    ]
    dense = evaluations["dense"]
    texts = {name: read_json(text_file(output, name))["continuations"] for name in readers}
    return Report(
        model=model,
        pattern="2:4",
        evaluation={"data": data} | {key: dense[key] for key in ("data_kind", "windows", "seq_length", "dtype", "device")},
        machine=machine(("torch", "megatron-core", "transformers")) | {"commit": commit()},
        settings=settings | {"prior": prior},
        results=results,
        steps=[
            {"name": name, **{key: steps.records[name][key] for key in ("seconds", "peak_memory_bytes")}} for name in steps.names
        ],
        metrics=read_lines(output / "megatron" / LEARNED / "metrics.jsonl"),
        weights_metrics=read_lines(output / "megatron" / FINAL / "metrics.jsonl"),
        continuations=[
            {"prompt": entries[0]["prompt"], "texts": {name: entry["text"] for name, entry in zip(texts, entries, strict=True)}}
            for entries in zip(*texts.values(), strict=True)
        ],
        speed=[
            entry | {"model": name}
            for name, entry in zip((COMPRESSED, DENSE), read_json(speed_file(output))["results"], strict=True)
        ],
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
