"""Every file that the program writes can be read by those to whom the umask gives it, whatever library wrote it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from maskllm.checkpoints.reading import resolve
from maskllm.checkpoints.saving import CheckpointSaver
from maskllm.cli import main
from maskllm.megatron.process_groups import parallel_processes
from maskllm.pruning.solve import PrunedMatrix
from maskllm.pruning.store import DirectoryStore
from tests.evaluation.conftest import model_directory, text_file  # noqa: F401 (fixtures)


@pytest.fixture(params=[0o022, 0o027])
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_all_outputs_follow_the_umask(umask, model_directory, text_file, tmp_path):  # noqa: F811
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": text_file.read_text()}) + "\n")
    out, hf = tmp_path / "out", str(model_directory)
    calibrated = ["--calibration-data", texts, "--calibration-samples", 1, "--seq-length", 32, "--params-dtype", "fp32"]
    calibrated += ["--method", "sparsegpt", "--update-weights"]
    for verb, *options in (
        ("convert", "--hf", hf, "--output", out / "dense", "--json", out / "convert.json"),
        ("preprocess", "--input", texts, "--output-prefix", out / "data" / "texts", "--tokenizer", hf, "--json", out / "data.json"),
        ("prune", "--load", out / "dense", "--output", out / "pruned", "--json", out / "prune.json", *calibrated),
        ("trim", "--load", out / "pruned", "--output", out / "trimmed", "--json", out / "trim.json"),
        ("export", "--load", out / "trimmed", "--output", out / "hf", "--mask-file", out / "m.npz", "--max-shard-size", "20KB"),
        ("evaluate", "--model", out / "hf", "--data", text_file, "--seq-length", 32, "--json", out / "evaluate.json"),
    ):
        assert main([verb, *map(str, options)]) == 0
    with parallel_processes():
        saver = CheckpointSaver(out / "run", resolve(out / "dense").hf_directory)
        saver.save(3, {"w": ShardedTensor.from_rank_offsets("w", torch.ones(10))}, resolve(out / "dense").info)
        DirectoryStore(out / "layers", {}).save(0, {"w": PrunedMatrix(torch.ones(4, 4).bool(), torch.ones(4, 4), {})})
    places = [out, *out.rglob("*")]
    names = {path.name for path in places}
    assert {"m.npz", "texts_text_document.idx", "model.safetensors.index.json", ".metadata", "layer_00000.safetensors"} <= names
    wanted = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in places}
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in places} == wanted
