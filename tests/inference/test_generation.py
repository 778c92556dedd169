"""Generated text against a loop over the model's whole forward pass, and the verb that prints it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from maskllm.cli import main
from maskllm.inference.generation import TextGenerator

PROMPTS = ["Ein Text, ", "zwei\nZeilen: \u00e4\u00f6\u00fc \u4e2d"]
CONTEXT = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random LLaMA whose tokens are bytes, with a generation config that asks for sampling and penalties."""
    path = tmp_path_factory.mktemp("model") / "hf"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])  # token 256
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 4, "num_beams": 3})
    )
    return path


def most_probable(directory: Path, tokens: list[int], number: int, end: int | None = None) -> list[int]:
    """The oracle: `number` tokens, each the arg-max of a forward pass over the whole text, up to the token `end`."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    new: list[int] = []
    while len(new) < number and end not in new:
        with torch.no_grad():
            new.append(int(model(torch.tensor([tokens + new])).logits[0, -1].argmax()))
    return new


def encoded(model: Path, prompt: str) -> list[int]:
    return Tokenizer.from_file(str(model / "tokenizer.json")).encode(prompt).ids


def spelled(model: Path, tokens: list[int]) -> str:
    return Tokenizer.from_file(str(model / "tokenizer.json")).decode(tokens)


def test_each_token_is_the_most_probable_one(model):
    generator = TextGenerator(model, device="cpu")
    for prompt in PROMPTS:
        found = generator.continue_text(prompt, 20)
        wanted = most_probable(model, encoded(model, prompt), 20)
        assert len(set(wanted)) > 2
        assert (found.prompt, found.text, found.new_tokens) == (prompt, spelled(model, wanted), 20)


def test_a_text_ends_with_the_end_token_which_is_not_shown(model, tmp_path):
    directory = shutil.copytree(model, tmp_path / "hf")
    tokens = encoded(model, PROMPTS[0])
    (end,) = most_probable(model, tokens, 4)[3:]
    for config in ({"eos_token_id": end}, {"eos_token_id": [256, end]}):
        (directory / "generation_config.json").write_text(json.dumps(config))
        found = TextGenerator(directory, device="cpu").continue_text(PROMPTS[0], 20)
        assert found.new_tokens == len(most_probable(model, tokens, 20, end)) <= 4


def test_a_text_ends_where_the_context_ends(model, capsys):
    prompt = "x" * (CONTEXT - 3)
    assert TextGenerator(model, device="cpu").continue_text(prompt, 20).new_tokens == 3
    assert main(["generate", "--model", str(model), "--prompt", prompt + "xxx"]) == 1
    assert f"--prompt: has {CONTEXT} tokens; the model has a context of {CONTEXT}" in capsys.readouterr().err


def test_the_verb_prints_the_same_text_with_and_without_stream(model, tmp_path, capsys):
    words = ["generate", "--model", str(model), "--max-new-tokens", "9", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    for prompt in PROMPTS:
        words += ["--prompt", prompt]
    assert main(words) == 0
    whole = capsys.readouterr().out
    assert main([*words, "--stream"]) == 0
    assert capsys.readouterr().out == whole
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["model"], found["max_new_tokens"], found["dtype"], found["device"]) == (str(model), 9, "float32", "cpu")
    assert [entry["prompt"] for entry in found["continuations"]] == PROMPTS
    assert whole == "\n\n".join(entry["prompt"] + entry["text"] for entry in found["continuations"]) + "\n"


def test_the_space_after_a_prompt_is_kept(model, tmp_path):
    """A SentencePiece tokenizer spells no space before a first word, so new tokens alone would stick to the prompt."""
    directory = shutil.copytree(model, tmp_path / "hf")
    vocabulary = {"<unk>": 0, "\u2581a": 1, "\u2581b": 2, "\u2581c": 3} | {
        f"\u2581word{number}": number for number in range(4, 257)
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(directory / "tokenizer.json"))
    found = TextGenerator(directory, device="cpu").continue_text("a b", 5)
    names = {index: name for name, index in vocabulary.items()}
    wanted = most_probable(directory, [1, 2], 5)
    assert 0 not in wanted and found.text == "".join(names[token] for token in wanted).replace("\u2581", " ")


def test_bad_input_ends_with_one_line(model, tmp_path, capsys):
    def refused(*words: object) -> str:
        assert main(["generate", *map(str, words)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "nowhere: no such directory" in refused("--model", "nowhere", "--prompt", "a")
    assert "--prompt: found an empty value" in refused("--model", model, "--prompt", "a", "--prompt", "")
    assert "--device nonsense: cannot be used here" in refused("--model", model, "--prompt", "a", "--device", "nonsense")
    directory = shutil.copytree(model, tmp_path / "hf")
    (directory / "tokenizer.json").write_text("{}")
    assert f"{directory}: transformers cannot read its tokenizer" in refused("--model", directory, "--prompt", "a")
