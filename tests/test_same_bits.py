"""The comparison behind `benchmarks/same_bits.py` must find every change that is not a time, and name its place."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from benchmarks import same_bits
from benchmarks.bitwise import compare, difference

METRICS = [{"kind": "train", "iteration": step, "loss": 2.5 - step / 8, "tokens_per_second": 100.0 + step} for step in range(3)]


def save_checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    (folder / "maskllm.json").write_text(json.dumps({"stage": "trained"}))


def write_tree(folder: Path) -> dict[str, torch.Tensor]:
    """What a pipeline leaves, very small; returns the checkpoint's tensors."""
    torch.manual_seed(0)
    tensors = {"weight": torch.randn(4, 8).to(torch.bfloat16), "mask_logits": torch.zeros(3, 6), "step": torch.tensor(5.0)}
    folder.mkdir()
    save_checkpoint(folder / "iter_0000005", tensors)
    np.savez(folder / "mask.npz", first=np.arange(4, dtype=np.uint8), second=np.ones(2, dtype=np.uint8))
    save_file(tensors, folder / "model.safetensors")
    (folder / "data.bin").write_bytes(bytes(range(100)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    (folder / "report.json").write_text(
        json.dumps({"perplexity": 12.5, "seconds": 3.0, "layers": [{"solve_seconds": 1.0, "nll": 2.0}]})
    )
    (folder / ".lock").write_text("process 1")
    return tensors


@pytest.fixture
def trees(tmp_path):
    tensors = write_tree(tmp_path / "first")
    write_tree(tmp_path / "second")
    return tmp_path / "first", tmp_path / "second", tensors


def test_what_two_runs_of_the_same_code_write_is_the_same_and_counted(trees):
    first, second, _ = trees
    slower = [line | {"tokens_per_second": 1.0} for line in METRICS]
    (second / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in slower))
    (second / "report.json").write_text(
        json.dumps({"perplexity": 12.5, "seconds": 9.0, "layers": [{"solve_seconds": 2.0, "nll": 2.0}]})
    )
    (second / ".lock").write_text("process 2")
    counts: Counter[str] = Counter()
    assert compare(first, second, counts) == []
    expected = {"checkpoints": 1, "tensors": 3, "arrays": 2, "lines": 3}
    assert {kind: counts[kind] for kind in expected} == expected
    assert counts["bytes"] == 100 + (first / "model.safetensors").stat().st_size


def change_tensor(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    changed = tensors["mask_logits"].clone()
    changed[2, 5] = -0.0  # equal to 0, but for a bit
    save_checkpoint(folder / "iter_0000005", tensors | {"mask_logits": changed})


def change_dtype(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_checkpoint(folder / "iter_0000005", tensors | {"weight": tensors["weight"].float()})


def lose_tensor(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_checkpoint(folder / "iter_0000005", {key: tensor for key, tensor in tensors.items() if key != "step"})


def lose_file(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "iter_0000005" / "maskllm.json").unlink()


def lose_checkpoint(folder: Path, _: dict[str, torch.Tensor]) -> None:
    shutil.rmtree(folder / "iter_0000005")


def change_line(folder: Path, _: dict[str, torch.Tensor]) -> None:
    lines = [*METRICS[:2], METRICS[2] | {"loss": float(np.nextafter(METRICS[2]["loss"], 9))}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def lose_line(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS[:2]))


def change_report(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "report.json").write_text(json.dumps({"perplexity": 12.5, "layers": [{"nll": 2.0000001}]}))


def change_mask(folder: Path, _: dict[str, torch.Tensor]) -> None:
    np.savez(folder / "mask.npz", first=np.arange(4, dtype=np.uint8), second=np.array([1, 3], dtype=np.uint8))


def change_byte(folder: Path, _: dict[str, torch.Tensor]) -> None:
    (folder / "data.bin").write_bytes(bytes([*range(99), 0]))


def change_safetensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors | {"step": torch.tensor(6.0)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (change_tensor, "iter_0000005[mask_logits]: 1 of 18 entries, at 17 0.0 and -0.0"),
        (change_dtype, "iter_0000005[weight]: torch.bfloat16 [4, 8] and torch.float32 [4, 8]"),
        (lose_tensor, "iter_0000005[step]: only in the first"),
        (lose_file, "maskllm.json: only "),
        (lose_checkpoint, "iter_0000005: only "),
        (change_line, "metrics.jsonl[2][loss]: 2.25 and 2.2500000000000004"),
        (lose_line, "metrics.jsonl[2]: only in the first"),
        (change_report, "report.json[layers][0][nll]: 2.0 and 2.0000001"),
        (change_mask, "mask.npz[second]: 1 of 2 entries, at 1 1 and 3"),
        (change_byte, "data.bin: 1 of 100 entries, at 99 99 and 0"),
        (change_safetensors, "model.safetensors: "),
    ],
)
def test_a_change_is_found_and_its_place_named(trees, change, place):
    first, second, tensors = trees
    change(second, tensors)
    (line,) = compare(first, second, Counter())
    assert place in line


def test_not_a_number_is_the_same_as_itself_and_other_types_are_not_the_same():
    nan = float("nan")
    assert difference({"loss": nan, "tensor": torch.tensor(nan)}, {"loss": nan, "tensor": torch.tensor(nan)}) is None
    assert difference(1, 1.0) == ": 1 and 1.0"
    assert difference([1, 2], [1, 2, 3]) == "[2]: only in the second"


@pytest.mark.slow
def test_two_runs_of_a_checkout_write_the_same(tmp_path):
    """The first commands of the benchmark, in new processes, from its own inputs."""
    same_bits.make_inputs(tmp_path / "inputs")
    for name in ("before", "after"):
        same_bits.Runner(name, Path(__file__).parents[1], tmp_path / name).run(1, *same_bits.FIRST[:2])
    counts: Counter[str] = Counter()
    assert same_bits.show("preprocess and convert", tmp_path / "before", tmp_path / "after", counts) == 0
    assert counts["tensors"] > 10
