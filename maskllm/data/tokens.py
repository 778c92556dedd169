"""What a tokenizer is, and the tokens that it gives."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maskllm.data.round_trip import RoundTrip


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
    """Strings of the special tokens. A Hugging Face tokenizer reads such a string in a text as the token. SentencePiece reads it as
    text, unless Hugging Face files beside the model say that it is a token."""

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> TokenBatch:
        """The tokens of each text."""

    @abc.abstractmethod
    def round_trip(self, text: str) -> RoundTrip:
        """What the tokens of `text` spell. The tokens that are added around every text do not count."""

    def encode(self, text: str) -> np.ndarray:
        """The tokens of one text, int32 [tokens]."""
        return self.encode_batch([text]).ids
