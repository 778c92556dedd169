"""Tiny tokenizers, which are trained here, and a corpus of difficult texts with its tokens by the tokenizers' own libraries."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

WORDS = [
    "the", "a", "model", "weight", "of", "mask", "sparse", "and", "trained", "in", "2024", "to", "it's", "don't", "naïve", "Zeile",
    "ночь", "夜", "学习", "is,", "not.", "very", "(long)", "text", "x=1",
]  # fmt: skip
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def passages(count: int, seed: int = 0) -> list[str]:
    """Random texts of 1 to 200 words."""
    generator = random.Random(seed)
    separators = [" "] * 20 + ["  ", "\n", "\n\n", "\t", ", "]
    return [
        "".join(generator.choice(WORDS) + generator.choice(separators) for _ in range(generator.randint(1, 200)))
        for _ in range(count)
    ]


TRICKY = ["", " ", "\n", "a</s>b", "<s>", "</s></s> 5", "  2024  x", "𝠀 \U00046131", "\u0130 e\u0301", "\x01\x00", "word " * 3000]


def write_hf_tokenizer(directory: Path, *, digits: bool = False, bos: bool = False, vocab_size: int = 600) -> Path:
    """Write a byte-level BPE tokenizer that splits text as Llama 3 does, which gigatoken supports.

    With `digits` it splits text as StarCoder does, which gigatoken does not support. With `bos` it puts <s> first.
    """
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


def train_sentencepiece(sentences: list[str], **settings: object) -> bytes:
    """A SentencePiece model with the settings of Llama 2 that change text: byte fallback, no normalization."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizers_directory(tmp_path_factory) -> Path:
    """`gigatoken`, `bos` and `digits` (Hugging Face directories) and `tokenizer.model` (SentencePiece BPE, byte fallback)."""
    root = tmp_path_factory.mktemp("tokenizers")
    write_hf_tokenizer(root / "gigatoken")
    write_hf_tokenizer(root / "bos", bos=True)
    write_hf_tokenizer(root / "digits", digits=True)
    lines = [line for text in passages(200) for line in text.splitlines() if line.strip()]
    (root / "tokenizer.model").write_bytes(train_sentencepiece(lines, vocab_size=420, split_digits=True))
    return root


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Passages of words, and difficult texts between them."""
    return [text for pair in zip(passages(len(TRICKY), seed=1), TRICKY, strict=True) for text in pair] + passages(150, seed=2)


class Reference(NamedTuple):
    """A tokenizer as its own library reads it."""

    rows: list[list[int]]
    """The tokens of each text of the corpus."""
    vocab_size: int
    eod: int | None


def read_with_library(path: Path, texts: list[str]) -> Reference:
    """Encode the texts one at a time with transformers or sentencepiece."""
    if path.suffix == ".model":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        rows = [[processor.bos_id(), *processor.encode(text)] for text in texts]
        return Reference(rows, processor.vocab_size(), processor.eos_id())
    tokenizer = AutoTokenizer.from_pretrained(path)
    return Reference([tokenizer(text).input_ids for text in texts], len(tokenizer), tokenizer.eos_token_id)


@pytest.fixture(scope="session")
def reference(tokenizers_directory, corpus) -> Callable[[str], Reference]:
    """The corpus by the tokenizer of that name in `tokenizers_directory`. Each is encoded once a session."""
    return functools.cache(lambda name: read_with_library(tokenizers_directory / name, corpus))


def write_json_lines(path: Path, texts: list[str]) -> Path:
    """Write texts in C4's format, some of them with all characters beyond ASCII escaped."""
    lines = [json.dumps({"url": "https://example.org", "text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
