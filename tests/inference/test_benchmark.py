"""`maskllm benchmark`: what it measures, and what it prints."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, WhisperFeatureExtractor

from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.compress import compress
from maskllm.inference.benchmark import BenchmarkResult, BenchmarkSettings, measure, table
from tests.inference.sparse_models import write_sparse


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the sparse model hf and the compressed one, small."""
    path = tmp_path_factory.mktemp("models")
    write_sparse(path / "hf", "llama3", torch.float32)
    compress(path / "hf", path / "small")
    return path


def test_numbers_of_a_model(models):
    result = measure("name", models / "small", BenchmarkSettings(prompt_tokens=7, new_tokens=5, rows=3, device="cpu"))
    loaded = AutoModelForCausalLM.from_pretrained(models / "small")
    assert result.weight_bytes == sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert result.file_bytes == (models / "small" / "model.safetensors").stat().st_size
    assert result.peak_memory_bytes > result.weight_bytes and result.threads == torch.get_num_threads()
    assert (result.model, result.dtype, result.device) == ("name", "float32", "cpu")
    assert 0 < result.first_token_seconds < 60 and 0 < result.tokens_per_second < 1e6


def test_times_are_those_of_the_tokens(models, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("maskllm.inference.benchmark.time.perf_counter", lambda: float(next(ticks)))
    result = measure("name", models / "hf", BenchmarkSettings(prompt_tokens=4, new_tokens=6, rows=2, device="cpu"))
    assert result.load_seconds == 1 and result.first_token_seconds == 1  # a tick each
    assert result.tokens_per_second == 2 * 5 / 5 and result.texts_per_second == 2 / 6


def test_encoder_decoder_models(tmp_path):
    write_sparse(tmp_path / "t5", "t5", torch.float32)
    compress(tmp_path / "t5", tmp_path / "small")
    settings = BenchmarkSettings(prompt_tokens=7, new_tokens=5, rows=3, device="cpu")
    result = measure("name", tmp_path / "small", settings)
    assert result.audio_seconds is None and result.texts_per_second > 0
    write_sparse(tmp_path / "whisper", "whisper", torch.float32)
    with pytest.raises(MaskLLMError, match="whisper: transformers cannot read its feature extractor"):
        measure("name", tmp_path / "whisper", settings)
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=1000, hop_length=50, n_fft=100, chunk_length=2)
    extractor.save_pretrained(tmp_path / "whisper")
    result = measure("name", tmp_path / "whisper", settings)
    assert result.audio_seconds == 2.0 and result.tokens_per_second > 0
    with pytest.raises(MaskLLMError, match="name: has a context of 40 tokens; --new-tokens and the first one make 41"):
        measure("name", tmp_path / "whisper", dataclasses.replace(settings, new_tokens=40))


def test_the_command_measures_each_model_in_its_own_process(models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--prompt-tokens", "8", "--new-tokens", "4", "--device", "cpu"]
    output = ["--json", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.svg")]
    assert main(["benchmark", "--model", str(models / "small"), "--against", str(models / "hf"), *arguments, *output]) == 0
    printed = capsys.readouterr().out
    numbers = json.loads((tmp_path / "out.json").read_text())
    small, dense = numbers["results"]
    assert numbers["settings"] == {"prompt_tokens": 8, "new_tokens": 4, "rows": 1, "dtype": None, "device": "cpu"}
    assert small["weight_bytes"] < dense["weight_bytes"] and small["file_bytes"] < dense["file_bytes"]
    assert f"{small['weight_bytes'] / dense['weight_bytes']:.2f} of the weights' bytes" in printed
    assert "tokens a second" in (tmp_path / "out.svg").read_text()


def test_a_table():
    one = BenchmarkResult("small", 0.5, 30, 2, None, 1_000_000, 2_000_000, 3_000_000, 1, "float32", "cpu", 2)
    two = BenchmarkResult("dense", 0.25, 20, 0.125, None, 10_000_000, 4_000_000, 3_500_000, 1, "float32", "cpu", 2)
    lines = table([one, two]).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["small", "500.0", "30.00", "2", "1.0", "2.0", "3.0"]
    assert len({len(line) for line in lines[:4]}) == 1
    heard = table([dataclasses.replace(one, audio_seconds=5.0)]).splitlines()
    assert "seconds a second of audio" in heard[0] and "| 0.1 " in heard[2]
    assert lines[4] == "small generates 1.50 times as fast as dense, with 0.50 of the weights' bytes"


def test_refused(models, capsys):
    with pytest.raises(MaskLLMError, match="name: has a context of 512 tokens; --prompt-tokens and --new-tokens make 600"):
        measure("name", models / "hf", BenchmarkSettings(prompt_tokens=590, new_tokens=10, device="cpu"))
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "--model", str(models / "hf"), "--new-tokens", "1"])
    assert "argument --new-tokens: 1: wanted at least 2" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert main(["benchmark", "--model", "nowhere/model", "--figure", "out.txt"]) == 1
    assert "--figure out.txt: wanted a file that ends with .svg" in capsys.readouterr().err
    assert main(["benchmark", "--model", str(models / "hf"), "--against", "nowhere/model"]) == 1
    assert "nowhere/model: no such directory" in capsys.readouterr().err
