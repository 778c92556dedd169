"""Tokenizers as Megatron-LM reads them: Hugging Face `tokenizer.json` and SentencePiece `tokenizer.model`.

A Hugging Face tokenizer gives `tokenizer(text).input_ids`, with the tokens that its post-processor adds. Megatron-LM's
`_HuggingFaceTokenizer` does the same (since megatron-core 0.15 with `--tokenizer-hf-include-special-tokens`). A SentencePiece model
gives BOS and the text's pieces, as Megatron-LM's `_Llama2Tokenizer` does.

For some tokenizers, the library gigatoken gives the same tokens much faster. It is used if it is exact: see `GigatokenTokenizer`.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import json
import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import awkward
import gigatoken
import numpy as np
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from maskllm.errors import MaskLLMError, first_line


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of several texts, concatenated."""

    ids: np.ndarray
    """int32 [sum of lengths]"""
    lengths: np.ndarray
    """int64 [texts]"""

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]]) -> TokenBatch:
        """A batch of one text for each list of tokens."""
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return cls(np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths)

    def wrapped(self, before: Sequence[int] = (), after: Sequence[int] = (), *, empty: bool = True) -> TokenBatch:
        """The batch with the tokens `before` and `after` added to each text; to texts without tokens only if `empty`."""
        around = np.full(len(self.lengths), True) if empty else self.lengths > 0
        lengths = self.lengths + around * (len(before) + len(after))
        ends = np.cumsum(lengths)
        starts, ends = (ends - lengths)[around], ends[around]
        ids = np.empty(int(lengths.sum()), self.ids.dtype)
        own = np.full(len(ids), True)
        for tokens, first in ((before, starts), (after, ends - len(after))):
            for offset, token in enumerate(tokens):
                ids[first + offset] = token
                own[first + offset] = False
        ids[own] = self.ids
        return TokenBatch(ids, lengths)


class Tokenizer(abc.ABC):
    """Turns text into tokens. Several threads may call it; each call works on one core."""

    library: str
    """The library that encodes."""
    vocab_size: int
    eod: int | None
    """The token that ends a document: the tokenizer's end-of-sequence token, or None if it has none."""
    special_tokens: list[str]
    """Strings of the special tokens. A Hugging Face tokenizer reads such a string in a text as the token, SentencePiece as text."""

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> TokenBatch:
        """The tokens of each text."""

    def encode(self, text: str) -> np.ndarray:
        """The tokens of one text, int32 [tokens]."""
        return self.encode_batch([text]).ids


class HuggingFaceTokenizer(Tokenizer):
    """A fast tokenizer of transformers."""

    library = "tokenizers"

    def __init__(self, path: Path) -> None:
        try:
            if path.is_dir():
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
            else:
                tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        except Exception as error:  # transformers and tokenizers raise many types, even plain Exception
            raise MaskLLMError(f"{path}: not a readable Hugging Face tokenizer: {first_line(error, with_type=False)}") from error
        if not tokenizer.is_fast:
            raise MaskLLMError(f"{path}: {type(tokenizer).__name__} has no tokenizer.json; convert it to a fast tokenizer")
        self.backend = tokenizer.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = len(tokenizer)
        self.eod = tokenizer.eos_token_id
        self.special_tokens = [token.content for token in self.backend.get_added_tokens_decoder().values()]
        largest = max(self.backend.get_vocab(with_added_tokens=True).values())
        if largest >= self.vocab_size:
            raise MaskLLMError(
                f"{path}: token {largest} lies outside the {self.vocab_size} tokens of the vocabulary; its ids must have no gaps"
            )

    def encode_batch(self, texts: list[str]) -> TokenBatch:
        return TokenBatch.from_lists([encoding.ids for encoding in self.backend.encode_batch_fast(texts)])


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Every text starts with BOS."""

    library = "sentencepiece"

    def __init__(self, path: Path) -> None:
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise MaskLLMError(f"{path}: not a readable SentencePiece model: {first_line(error, with_type=False)}") from error
        if self.processor.bos_id() < 0:
            raise MaskLLMError(f"{path}: the SentencePiece model has no BOS token, which every text starts with")
        self.bos = self.processor.bos_id()
        self.vocab_size = self.processor.vocab_size()
        self.eod = None if self.processor.eos_id() < 0 else self.processor.eos_id()
        ids = range(self.vocab_size)
        kinds = (self.processor.is_control, self.processor.is_unknown)
        self.special_tokens = [self.processor.id_to_piece(i) for i in ids if any(kind(i) for kind in kinds)]

    def encode_batch(self, texts: list[str]) -> TokenBatch:
        return TokenBatch.from_lists(self.processor.encode(texts, num_threads=1)).wrapped([self.bos])


class InexactError(Exception):
    """gigatoken cannot encode exactly as the tokenizer's own library does, or has just given other tokens."""


class GigatokenTokenizer(Tokenizer):
    """gigatoken instead of another tokenizer, the `reference`.

    These checks keep it exact. They raise InexactError:

    * The tokenizer must not have features that gigatoken treats differently: BPE dropout, and added tokens that strip white space
      or match whole words only.
    * It must agree with the reference on `probe_texts`.
    * Both encode a passage of every batch, and the results are compared.

    A text that contains the string of a special token is left to a SentencePiece reference, which treats that string as plain text.

    gigatoken remembers every word that it has met, which takes up to ten bytes for each byte of text. To bound memory, a fresh
    gigatoken replaces it after RENEW_CHARACTERS.
    """

    library = "gigatoken"
    RENEW_CHARACTERS = 1 << 27
    """Characters of text after which gigatoken is replaced."""

    def __init__(self, reference: HuggingFaceTokenizer | SentencePieceTokenizer) -> None:
        self.reference = reference
        self.vocab_size, self.eod, self.special_tokens = reference.vocab_size, reference.eod, reference.special_tokens
        self._batches = self._characters = 0
        self._lock = threading.Lock()
        try:
            if isinstance(reference, SentencePieceTokenizer):
                model = reference.processor.serialized_model_proto()
                self._fresh = functools.partial(gigatoken.Tokenizer.from_sentencepiece, model)
                self._before, self._after = [reference.bos], []
                self._left_to_reference = reference.special_tokens
            else:
                contents = reference.backend.to_str()
                _refuse_inexact_features(json.loads(contents))
                self._fresh = functools.partial(gigatoken.Tokenizer.from_json, contents)
                self._before, self._after = _added_around(reference)
                self._left_to_reference = []
            self._tokenizer = self._fresh()
        except (ValueError, RuntimeError, KeyError, TypeError) as error:  # what gigatoken raises for what it does not support
            raise InexactError(first_line(error, with_type=False)) from error
        self._compare(probe_texts(reference.special_tokens))

    def encode_batch(self, texts: list[str]) -> TokenBatch:
        if not texts:
            return TokenBatch.from_lists([])
        with self._lock:
            self._batches += 1
            self._characters += sum(map(len, texts))
            if self._characters > self.RENEW_CHARACTERS:
                self._tokenizer, self._characters = self._fresh(), 0
            passage = texts[self._batches % len(texts)][:2000]
        self._compare([passage])
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> TokenBatch:
        left = [i for i, text in enumerate(texts) if any(token in text for token in self._left_to_reference)]
        if left:
            rows = {i: self.reference.encode(texts[i]) for i in left}
            rest = self._encode([text for i, text in enumerate(texts) if i not in rows])
            others = iter(np.split(rest.ids, np.cumsum(rest.lengths)[:-1]))
            ordered = [rows[i] if i in rows else next(others) for i in range(len(texts))]
            return TokenBatch(np.concatenate(ordered), np.array([len(row) for row in ordered], np.int64))
        if not texts:
            return TokenBatch.from_lists([])
        rows = self._tokenizer.encode_batch(texts, parallel=False)
        ids, lengths = awkward.to_numpy(awkward.flatten(rows)), awkward.to_numpy(awkward.num(rows))
        return TokenBatch(ids.astype(np.int32), lengths.astype(np.int64)).wrapped(self._before, self._after)

    def _compare(self, texts: list[str]) -> None:
        ours, reference = self._encode(texts), self.reference.encode_batch(texts)
        if not (np.array_equal(ours.lengths, reference.lengths) and np.array_equal(ours.ids, reference.ids)):
            raise InexactError("gigatoken and the tokenizer's own library disagree")


def load_tokenizer(path: str | os.PathLike, *, use_gigatoken: bool = True) -> Tokenizer:
    """Read a tokenizer from a Hugging Face directory or tokenizer.json, or a SentencePiece tokenizer.model.

    transformers reads a directory with a tokenizer.json, or with other files that it can turn into a fast tokenizer. A directory
    with only a tokenizer.model is read as a SentencePiece model. Raises MaskLLMError for anything else.
    """
    path = Path(path)
    if not path.exists():
        raise MaskLLMError(f"{path}: no such tokenizer; wanted a directory with tokenizer.json, or a tokenizer.model file")
    if path.is_dir() and not (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        if not (path / "tokenizer.model").exists():
            raise MaskLLMError(f"{path}: no tokenizer.json and no tokenizer.model in this directory")
        path = path / "tokenizer.model"
    reference = SentencePieceTokenizer(path) if path.suffix == ".model" else HuggingFaceTokenizer(path)
    if use_gigatoken:
        with contextlib.suppress(InexactError):
            return GigatokenTokenizer(reference)
    return reference


def probe_texts(special_tokens: Sequence[str]) -> list[str]:
    """Texts on which tokenizers often differ.

    They hold white space, digits, contractions, scripts, combining marks, control characters and special tokens.
    """
    texts = [
        "", " ", "  ", "\n", "\r\n\r\n  x\t\t y ", " leading", "trailing ", "  2024 x  12 12345678 1234\n 7",
        "don't I'LL we'Re 's '\u017f \u017fs", "\x00\x01\x7f\u0080", "e\u0301é \u200b ﬁ ½ \u0663 ²", "日本語テキスト\u3000全角ｱ",
        "\ud7ff\ue000\uffff", "𝠀\U00046131 \U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "\u00a0\u2003x\u2028y\u0085z\ufeff",
        "\u0130I\u0131i ẛ\u0323 ǅ", "a" * 3000, " " * 3000, "\n" * 1000, "HTTPServer camelCase snake_case ALLCAPS ",
        "x = {'a': [1, 2]}  # comment\n\tif x != y: return -1.5e-3", "<0x0A> ▁x x▁y",
    ]  # fmt: skip
    for token in special_tokens[:50]:
        texts += [token, f"a{token}b", f" {token} {token}{token} 5", token[:-1]]
    generator = random.Random(0)
    alphabets = [
        "ab'  \n\t.,-12", "aZ éß'\u2019 \r\n0", [chr(c) for c in range(1, 0x250)], "的一是 、。ab ", "абв ёЁ 12",
        "\u0627\u0628\u062a \u0660\u0661 ", [chr(c) for c in range(1, 0x20000) if not 0xD800 <= c < 0xE000],
    ]  # fmt: skip
    return texts + ["".join(generator.choices(alphabet, k=60)) for alphabet in alphabets for _ in range(20)]


def _refuse_inexact_features(contents: dict) -> None:
    """Raise InexactError if a tokenizer.json has a feature that gigatoken treats differently."""
    if contents["model"].get("dropout"):
        raise InexactError("the tokenizer uses BPE dropout")
    for token in contents["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise InexactError(f"added token {token['content']!r} strips white space or matches whole words only")


def _added_around(tokenizer: HuggingFaceTokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the post-processor puts before and after a text. Raises InexactError if it does anything else."""
    alone = tokenizer.backend.encode("a", add_special_tokens=False).ids
    whole = tokenizer.backend.encode("a").ids
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    raise InexactError("the post-processor changes the text's own tokens")


@contextlib.contextmanager
def one_core_a_call() -> Iterator[None]:
    """A block in which calls of the tokenizers library use one thread each, for callers that start several threads themselves."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before
