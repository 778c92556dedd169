"""The library gigatoken, which gives the same tokens as other libraries much faster, if it is exact for a tokenizer."""

from __future__ import annotations

import functools
import json
import random
import threading
from collections.abc import Sequence

import awkward
import gigatoken
import numpy as np

from maskllm.data.huggingface_tokenizer import HuggingFaceTokenizer, added_around
from maskllm.data.round_trip import RoundTrip
from maskllm.data.sentencepiece_tokenizer import SentencePieceTokenizer
from maskllm.data.tokens import TokenBatch, Tokenizer
from maskllm.errors import whole_message


class InexactError(Exception):
    """gigatoken cannot encode exactly as the tokenizer's own library does, or has just given other tokens."""


class GigatokenTokenizer(Tokenizer):
    """gigatoken instead of another tokenizer, the `reference`.

    These checks keep it exact. They raise InexactError:

    * The tokenizer must not have features that gigatoken treats differently: BPE dropout, and added tokens that strip white space
      or match whole words only.
    * It must agree with the reference on `probe_texts`.
    * Both encode a passage of every batch, and the results are compared.

    A text that contains the string of a special token is left to a SentencePiece reference: gigatoken reads such strings in its own way.

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
                self._before, self._after = reference.before, reference.after
                self._left_to_reference = reference.left_out
            else:
                contents = reference.backend.to_str()
                _refuse_inexact_features(json.loads(contents))
                self._fresh = functools.partial(gigatoken.Tokenizer.from_json, contents)
                around = added_around(reference.backend)
                if around is None:
                    raise InexactError("the post-processor changes the text's own tokens")
                self._before, self._after = around
                self._left_to_reference = None
            self._tokenizer = self._fresh()
        except (ValueError, RuntimeError, KeyError, TypeError) as error:  # what gigatoken raises for what it does not support
            raise InexactError(whole_message(error)) from error
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

    def round_trip(self, text: str) -> RoundTrip:
        return self.reference.round_trip(text)

    def _encode(self, texts: list[str]) -> TokenBatch:
        pattern = self._left_to_reference
        left = [] if pattern is None else [i for i, text in enumerate(texts) if pattern.search(text)]
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
