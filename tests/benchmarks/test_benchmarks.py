"""Every benchmark runs, at a tiny size, by the command of its measurement, and its table can be made of what it writes."""

from __future__ import annotations

import gzip
import importlib
import itertools
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks import machine, masked_weight, sparse_linear
from benchmarks.registry import MEASUREMENTS, TABLES, Measurement
from benchmarks.results import Result
from benchmarks.same_bits import make_inputs
from maskllm.patterns import Pattern
from maskllm.pruning import magnitude_mask

ROOT = Path(__file__).parents[2]
NO_BENCHMARKS = {
    "__init__",
    "bitwise",
    "finetuning",
    "machine",
    "models",
    "registry",
    "report",
    "results",
    "rival_programs",
    "tables",
    "trainings",
}
TESTED_ELSEWHERE = {
    "kill_resume": "tests/training/test_kill_resume.py",
    "same_bits": "tests/test_same_bits.py",
    "serve": "tests/inference/test_vllm.py",
    "sparse_fuzz": "tests/ops/test_sparse_fuzz.py",
}
TINY = {one.name: one for one in MEASUREMENTS.values() if one.tiny is not None}
TASKS = {
    "piqa": {"query": "Question: Two and two", "choices": ["four", "five"], "gold": 0},
    "arc_easy": {"query": "Question: Red is", "choices": ["a colour", "a number", "a word"], "gold": 0},
    "openbook_qa": {"query": "Water is", "choices": ["wet", "dry"], "gold": 0},
    "winogrande": {"context_options": ["The cat ate, so the cat", "The cat ate, so the dog"], "continuation": "slept", "gold": 0},
}


def prune(file: Path) -> None:
    """Make the matrices of the blocks 2:4."""
    weights = load_file(file)
    for name, weight in weights.items():
        if ".layers." in name and weight.dim() == 2:
            weight *= magnitude_mask(weight, Pattern(2, 4))
    save_file(weights, file, {"format": "pt"})


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> dict[str, str]:
    """What stands in the braces of a command: a tiny model and tiny texts."""
    from maskllm.checkpoints.convert import convert

    root = tmp_path_factory.mktemp("benchmarks")
    inputs, quickstart, data = root / "inputs", root / "quickstart", root / "data"
    make_inputs(inputs)
    config = inputs / "llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 512}))
    for name in ("dense", "sparsegpt", "learned", "final"):
        shutil.copytree(inputs / "llama", quickstart / "hf" / name)
        if name != "dense":
            prune(quickstart / "hf" / name / "model.safetensors")
    convert(inputs / "llama", quickstart / "megatron" / "dense")
    (quickstart / "corpus").mkdir()
    lines = (inputs / "text.jsonl").read_text().splitlines(keepends=True)
    (quickstart / "corpus" / "train.jsonl").write_text("".join(lines[:40]))
    (quickstart / "corpus" / "held_out.jsonl").write_text("".join(lines[40:]))
    (data / "zero-shot").mkdir(parents=True)
    shutil.copy(inputs / "text.jsonl", data / "c4-sample.train.json")
    shutil.copy(inputs / "held_out.txt", data / "wikitext-2-raw.test.txt")
    for task, item in TASKS.items():
        (data / "zero-shot" / f"{task}.jsonl").write_text(f"{json.dumps(item)}\n" * 3)
    (data / "translation").mkdir()
    for split in ("train", "val"):
        with gzip.open(data / "translation" / f"{split}.de.gz", "wt") as file:
            file.write("Zwei junge Männer stehen im Freien.\n" * 200)
    return {"data": str(data), "quickstart": str(quickstart), "dense": str(quickstart / "hf" / "dense")}


def test_every_benchmark_has_a_tiny_run():
    modules = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - NO_BENCHMARKS
    run = {word.partition(".")[2] for one in TINY.values() for word in one.command.split() if word.startswith("benchmarks.")}
    assert run | set(TESTED_ELSEWHERE) == modules
    for module, test in TESTED_ELSEWHERE.items():
        assert module in (ROOT / test).read_text()


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_runs_and_its_table_shows_the_result(name, places, ranks, tmp_path, monkeypatch, signal_handlers):
    one: Measurement = TINY[name]
    if "sparse_linear" in one.command and shutil.which("g++") is None:
        pytest.skip("needs g++")
    # Programs that the benchmark starts need no time for imports, and memory is read from a small cache.
    monkeypatch.setattr(sys, "executable", str(ranks.programs(tmp_path)))
    monkeypatch.setattr(machine, "cache_bytes", lambda device="cpu": 1 << 16)
    monkeypatch.setenv("MASKLLM_CACHE_DIR", str(tmp_path / "cache"))
    words = shlex.split(one.command.format(**places, work=tmp_path / "work")) + shlex.split(one.tiny)
    assert words[:2] == ["python", "-m"]
    file = tmp_path / "result.json"
    arguments = [*words[3:], "--json", str(file)]
    main = importlib.import_module("maskllm.cli" if words[2] == "maskllm" else words[2]).main
    assert not main(arguments)
    result = Result(json.loads(file.read_text()), None, None, None, {}, None, None, None)
    for table in TABLES.values():
        if name in table.measurements:
            assert sum(line.startswith("|") for line in table.render({name: result})) > 2


def test_the_table_of_a_gpu_is_made_of_what_it_measures(monkeypatch):
    """The CPU stands in for the GPU."""
    monkeypatch.setattr(machine, "cache_bytes", lambda device="cpu": 1 << 16)
    found = sparse_linear.on_gpu("cpu", [1, 17], 64, 128, 0.001)
    lines = TABLES["sparse-linear-cuda"].render({"sparse-linear/cuda": Result(found, None, None, None, {}, None, None, None)})
    assert len(lines) == 4 and "2:4 int4" in lines[0]


def test_the_bandwidth_is_that_of_memory_several_times_the_cache(monkeypatch):
    monkeypatch.setattr(machine, "cache_bytes", lambda device: 1000)
    times = itertools.count(step=0.5)
    assert machine.copy_bandwidth("cpu", lambda: next(times)) == 2 * 4000 / 0.5, "each byte is read and written"


def test_the_share_of_bandwidth_counts_what_the_kernels_read_and_write():
    """32 weights in bf16 with 48 logits in fp32: forward reads both and writes weights; backward reads them and adds to a gradient."""
    layer = masked_weight.Layer("layer", 4, 8, "cpu")
    assert layer.forward_bytes == 2 * 32 + 4 * 48 + 2 * 32
    assert layer.backward_bytes == 2 * 32 + 2 * 32 + 4 * 48 + 2 * 4 * 48
