"""The windows of C4 and of the Penn Treebank, as the papers' scripts cut them; batches of windows that do not fit into memory."""

from __future__ import annotations

import gzip
import json
import random

import numpy as np
import pytest
import torch

from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.evaluation.huggingface import evaluate_hf
from maskllm.evaluation.perplexity import perplexity
from maskllm.evaluation.text import read_evaluation_text
from maskllm.evaluation.windows import read_windows
from tests.evaluation.conftest import words


class Letters:
    """A tokenizer: BOS (0), then a token a character."""

    def encode(self, text: str) -> np.ndarray:
        return np.array([0, *map(ord, text)])


def shard(path, texts):
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text, "url": ""}) + "\n" for text in texts).encode()))
    return path


def test_windows_of_c4_are_those_of_random_documents(tmp_path):
    """The rule in its own words: seed 0; draw a document until one is longer than the window; draw the start."""
    generator = random.Random(5)
    texts = ["".join(generator.choices("abcdefgh", k=generator.choice([3, 9, 10, 30, 80]))) for _ in range(60)]
    found = read_windows(shard(tmp_path / "c4.json.gz", texts), Letters(), 10, data_format="c4")
    draw = random.Random(0)
    expected = []
    while len(expected) < 256:
        tokens = Letters().encode(texts[draw.randint(0, 59)])
        if len(tokens) > 10:
            start = draw.randint(0, len(tokens) - 11)
            expected.append(tokens[start : start + 10].tolist())
    assert found.windows.tolist() == expected
    assert found.windows.dtype == torch.int64 and found.kind == "c4: random documents, seed 0"
    assert any(window[0] == 0 for window in expected) and any(window[0] != 0 for window in expected)
    first = read_windows(tmp_path / "c4.json.gz", Letters(), 10, data_format="c4", max_windows=7)
    assert first.windows.tolist() == expected[:7]


def test_documents_that_are_all_too_short_are_an_error_and_not_an_endless_search(tmp_path):
    path = shard(tmp_path / "c4.json.gz", ["abc", "abcdefghi", "a"])
    with pytest.raises(MaskLLMError, match=r"c4\.json\.gz: none of its 3 documents has more than 10 tokens"):
        read_windows(path, Letters(), 10, data_format="c4")
    with pytest.raises(MaskLLMError, match=r"empty\.gz: no text to evaluate on"):
        read_windows(shard(tmp_path / "empty.gz", []), Letters(), 10, data_format="c4")


def test_c4_new_joins_the_first_1100_documents(tmp_path):
    texts = [f"document {number}" for number in range(1200)]
    path = shard(tmp_path / "c4.json.gz", texts)
    tokens = Letters().encode(" ".join(texts[:1100]))
    found = read_windows(path, Letters(), 10, data_format="c4-new")
    assert found.windows.tolist() == tokens[:2560].reshape(256, 10).tolist() and found.kind == "c4-new"
    assert len(read_windows(path, Letters(), 100, data_format="c4-new").windows) == len(tokens) // 100
    assert len(read_windows(path, Letters(), 10, data_format="c4-new", max_windows=3).windows) == 3


def test_rows_of_the_penn_treebank_are_joined_by_spaces(tmp_path):
    (tmp_path / "ptb.test.txt").write_text(" no it was n't black monday \n but while the <unk> N \n")
    read = read_evaluation_text(tmp_path / "ptb.test.txt", "ptb")
    assert (read.text, read.kind) == ("no it was n't black monday but while the <unk> N", "ptb rows")
    (tmp_path / "lines.json").write_text('{"text": "x"}\n')
    with pytest.raises(MaskLLMError, match=r"lines\.json:1: is JSON; --data-format ptb wants the rows"):
        read_evaluation_text(tmp_path / "lines.json", "ptb")


def test_every_output_states_the_window_and_the_rule(model_directory, tmp_path, capsys):
    path = shard(tmp_path / "c4.json.gz", [words(60, seed) for seed in range(5)])
    arguments = ["--model", str(model_directory), "--data", str(path), "--seq-length", "32", "--max-windows", "3"]
    assert main(["evaluate", *arguments, "--data-format", "c4", "--json", str(tmp_path / "f.json")]) == 0
    assert "(3 windows of 32 tokens, c4: random documents, seed 0, " in capsys.readouterr().out
    report = json.loads((tmp_path / "f.json").read_text())
    assert (report["seq_length"], report["windows"], report["batch_size"]) == (32, 3, 1)
    assert report["data_kind"] == "c4: random documents, seed 0"
    assert main(["evaluate", "--load", "x", "--data", "y", "--seq-length", "8", "--batch-size", "2"]) == 1
    assert "--batch-size: applies to --model and --tasks only" in capsys.readouterr().err


def test_batches_give_the_perplexity_of_single_windows(model_directory, text_file):
    one, several, auto = (
        evaluate_hf(model_directory, text_file, seq_length=32, batch_size=size, dtype=torch.float32, device="cpu")
        for size in (None, 6, "auto")
    )
    assert one.windows % 6 and (one.batch_size, several.batch_size, auto.batch_size) == (1, 6, one.windows)
    assert several.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert auto.perplexity == pytest.approx(one.perplexity, rel=1e-5)


def test_a_batch_that_does_not_fit_is_halved_and_said(capsys):
    sizes = []

    def window_nlls(windows):
        sizes.append(len(windows))
        if len(windows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return windows.sum(1).tolist()

    windows = torch.arange(70).view(7, 10)
    result = perplexity(window_nlls, windows, batch_size=16)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert result.batch_size == 1 and result.nll == pytest.approx(float((windows.sum(1) / 9).mean()))
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert lines == [
        "out of memory with batches of 7 windows; going on with 3",
        "out of memory with batches of 3 windows; going on with 1",
    ]


def test_one_window_that_does_not_fit_is_an_error():
    def window_nlls(windows):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(MaskLLMError, match="out of memory with one window of 10 tokens; use a smaller --seq-length"):
        perplexity(window_nlls, torch.arange(70).view(7, 10), batch_size=2)
