"""The file `run.json`: which commands are one run, and what it says of the stages."""

from __future__ import annotations

import json

import pytest
import torch

from maskllm.environment.memory import peak_memory_bytes
from maskllm.errors import MaskLLMError
from maskllm.finetuning.record import RunRecord
from maskllm.processes import peak_resident_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_only_a_stage_leaves_something(tmp_path):
    output = tmp_path / "out"
    RunRecord(output, lambda: {"data": [["/a", "1 bytes"]]}, CPU)
    assert not output.exists()
    record = RunRecord(output, lambda: {"data": [["/b", "2 bytes"]]}, CPU)
    with record.stage("prune"):
        assert json.loads((output / "run.json").read_text())["settings"] == {"data": [["/b", "2 bytes"]]}
    with pytest.raises(MaskLLMError, match=r"holds a run with --data /b \(2 bytes\), not /a \(1 bytes\); give the same options"):
        RunRecord(output, lambda: {"data": [["/a", "1 bytes"]]}, CPU)


def test_a_run_keeps_the_commit_and_the_machine_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr("maskllm.finetuning.record.commit", lambda: "first")
    with RunRecord(tmp_path / "out", dict, CPU).stage("prune"):
        pass
    monkeypatch.setattr("maskllm.finetuning.record.commit", lambda: "second")
    monkeypatch.setattr("maskllm.finetuning.record.machine", lambda packages: {"cpu": "another"})
    record = RunRecord(tmp_path / "out", dict, CPU)
    assert record.commit == "first"
    assert "torch" in record.machine


def test_the_memory_of_a_stage_is_that_of_the_gpu(tmp_path, monkeypatch):
    peaks = {"peak": 0}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update(peak=1000))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks["peak"])
    record = RunRecord(tmp_path / "out", dict, GPU)
    for name, allocated in (("prune", 7000), ("train", 5000)):
        with record.stage(name):
            peaks["peak"] += allocated
    assert [stage["peak_memory_bytes"] for stage in record.stages.values()] == [8000, 6000]
    assert peak_memory_bytes(CPU) == peak_resident_bytes()


@pytest.mark.parametrize("content", ['{"a": 1}', '{"settings": [], "stages": {}}', '{"format": 2, "settings": {}}'])
def test_the_record_of_another_program_is_no_run(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(MaskLLMError, match=f"--output {tmp_path}: exists and holds no run of maskllm finetune"):
        RunRecord(tmp_path, dict, CPU)
