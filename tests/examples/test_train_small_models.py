"""The scripts of examples/finetune that train a small T5 and a small MPT: what they write loads, and a stopped run ends as a whole one."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, Trainer

from tests.examples.scripts import script

WORDS = {"a": "ein", "dog": "Hund", "man": "Mann", "runs": "rennt", "sees": "sieht", "on": "auf", "grass": "Gras", "old": "alter"}
SENTENCES = [" ".join(words) for words in itertools.permutations(WORDS, 3)][:64]


def german(sentence: str) -> str:
    return " ".join(WORDS[word] for word in sentence.split())


@pytest.fixture
def t5_arguments(tmp_path: Path) -> list[str]:
    arguments = ["--vocabulary-size", "36", "--d-model", "16", "--d-ff", "16", "--layers", "1", "--heads", "1"]
    for split, sentences in {"train": SENTENCES, "validation": SENTENCES[:4], "test": SENTENCES[:4]}.items():
        files = [tmp_path / f"{split}.{language}" for language in ("en", "de")]
        for file, lines in zip(files, (sentences, map(german, sentences)), strict=True):
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        arguments += [f"--{split}", *map(str, files)]
    return [*arguments, "--epochs", "2", "--batch-size", "16", "--warmup-steps", "2"]


@pytest.fixture
def mpt_arguments(tmp_path: Path) -> list[str]:
    for name, sentences in {"train": SENTENCES, "held_out": SENTENCES[:8]}.items():
        lines = [json.dumps({"text": sentence}) for sentence in sentences]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["--train", str(tmp_path / "train.jsonl"), "--held-out", str(tmp_path / "held_out.jsonl")]
    arguments += ["--vocabulary-size", "300", "--d-model", "16", "--layers", "1", "--heads", "1", "--seq-length", "16"]
    return [*arguments, "--epochs", "2", "--batch-size", "4", "--warmup-steps", "2"]


def train(name: str, output: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(output)])
    script(name).main()
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize(
    ("name", "measure", "model_class"),
    [("train_t5", "bleu", AutoModelForSeq2SeqLM), ("train_mpt", "perplexity", AutoModelForCausalLM)],
)
def test_a_stopped_run_ends_as_a_whole_one(name, measure, model_class, request, tmp_path, monkeypatch):
    arguments = [*request.getfixturevalue(f"{name.partition('_')[2]}_arguments"), "--save-steps", "3"]
    whole = train(name, tmp_path / "whole", arguments, monkeypatch)
    assert whole["steps"] > 6

    step, stops = Trainer.training_step, iter([False] * 4 + [True])

    def stop_at_the_fifth(*inputs):
        if next(stops):
            raise KeyboardInterrupt
        return step(*inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", stop_at_the_fifth)
        train(name, tmp_path / "stopped", arguments, patch)
    assert [folder.name for folder in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["checkpoint-3"]
    resumed = train(name, tmp_path / "stopped", arguments, monkeypatch)
    assert (resumed["steps"], resumed[measure]) == (whole["steps"], whole[measure])

    models = [model_class.from_pretrained(tmp_path / folder) for folder in ("whole", "stopped")]
    weights = [model.state_dict() for model in models]
    assert all(torch.equal(weights[1][key], value) for key, value in weights[0].items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert len(tokenizer) == models[0].config.vocab_size
    assert tokenizer.decode(tokenizer(SENTENCES[0]).input_ids, skip_special_tokens=True) == SENTENCES[0]
