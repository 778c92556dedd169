"""Tiny tokenizers, trained here, and a corpus with everything in it that text can hold."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = [
    "the", "a", "model", "weight", "of", "mask", "sparse", "and", "trained", "in", "2024", "to", "it's", "don't", "naïve", "Zeile",
    "ночь", "夜", "学习", "is,", "not.", "very", "(long)", "text", "x=1",
]  # fmt: skip
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def passages(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    separators = [" "] * 20 + ["  ", "\n", "\n\n", "\t", ", "]
    return [
        "".join(generator.choice(WORDS) + generator.choice(separators) for _ in range(generator.randint(1, 200)))
        for _ in range(count)
    ]


TRICKY = ["", " ", "\n", "a</s>b", "<s>", "</s></s> 5", "  2024  x", "𝠀 \U00046131", "\u0130 e\u0301", "\x01\x00", "word " * 300000]


def write_hf_tokenizer(directory: Path, *, digits: bool = False, bos: bool = False, vocab_size: int = 600) -> Path:
    """A byte-level BPE tokenizer: GPT-2's or Llama 3's split (which gigatoken knows), or StarCoder's (which it does not)."""
    tokenizer = Tokenizer(models.BPE())
    if digits:
        split = pre_tokenizers.Digits(individual_digits=True)
    else:
        split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 600),
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages(200), trainer)
    contents = json.loads(tokenizer.to_str())
    vocab = contents["model"]["vocab"]
    vocab.update({f"unused{index}": index for index in range(len(vocab), vocab_size)})
    tokenizer = Tokenizer.from_str(json.dumps(contents))
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizers_directory(tmp_path_factory) -> Path:
    """`gigatoken`, `bos` and `digits` (Hugging Face directories) and `tokenizer.model` (SentencePiece BPE, byte fallback)."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_hf_tokenizer(root / "gigatoken")
    write_hf_tokenizer(root / "bos", bos=True)
    write_hf_tokenizer(root / "digits", digits=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in passages(200) for line in text.splitlines() if line.strip()),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    (root / "tokenizer.model").write_bytes(model.getvalue())
    return root


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [text for pair in zip(passages(len(TRICKY), seed=1), TRICKY, strict=True) for text in pair] + passages(150, seed=2)


def write_json_lines(path: Path, texts: list[str]) -> Path:
    lines = [json.dumps({"url": "https://example.org", "text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
