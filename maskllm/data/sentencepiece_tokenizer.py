"""Tokenizers of SentencePiece: `tokenizer.model`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers

from maskllm.data.round_trip import RoundTrip
from maskllm.data.tokenizer_files import TokenizerFiles
from maskllm.data.tokens import TokenBatch, Tokenizer
from maskllm.errors import MaskLLMError, whole_message


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, which normalizes and splits text as it did in its training.

    Every text starts with BOS. A model alone reads the strings of its control symbols as text. With Hugging Face files beside it, the
    strings of its control symbols and those of the tokens that the files list are tokens, and `add_bos_token` and `add_eos_token` say
    what is added around a text. The text between two such tokens is encoded as a text of its own. With `legacy` false, it gets no
    leading space, but for the text at the start (transformers 4's `LlamaTokenizer` does the same).
    """

    library = "sentencepiece"

    def __init__(self, path: Path, files: TokenizerFiles) -> None:
        """Raises MaskLLMError if `path` is no SentencePiece model, or has no BOS token though every text starts with it."""
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise MaskLLMError(f"{path}: not a readable SentencePiece model: {whole_message(error)}") from error
        size = self.processor.vocab_size()
        kinds = (self.processor.is_control, self.processor.is_unknown)
        own = {self.processor.id_to_piece(i): i for i in range(size) if any(kind(i) for kind in kinds)}
        added = {token.content: i for i, token in files.added_tokens.items()}
        self._ids = own | {name: i for name in files.named_tokens if (i := self._piece(name)) is not None} | added
        self.vocab_size = max(size, *(i + 1 for i in added.values()), 0)
        self.special_tokens = list(self._ids)
        eos, bos = self._token(files.eos_token, self.processor.eos_id()), self._token(files.bos_token, self.processor.bos_id())
        self.eod = eos
        if bos is None and files.add_bos is not False:
            raise MaskLLMError(f"{path}: the SentencePiece model has no BOS token, which every text starts with")
        self.before = [] if files.add_bos is False else [bos]
        self.after = [eos] if files.add_eos and eos is not None else []
        self._tokens = _one_of(files.added_tokens.values(), self._ids) if files.found else None
        self._stripping = {token.content: token for token in files.added_tokens.values() if token.lstrip or token.rstrip}
        self._later = self.processor
        if self._tokens is not None and files.legacy is False:
            # A field that follows overrides the one before: ModelProto.normalizer_spec (3) . add_dummy_prefix (3) = false.
            model = self.processor.serialized_model_proto() + b"\x1a\x02\x18\x00"
            self._later = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.left_out = self._tokens or _one_of((), self._ids)
        """Texts in which this pattern is found are not for gigatoken."""

    def encode_batch(self, texts: list[str]) -> TokenBatch:
        rows = self.processor.encode(texts, num_threads=1)
        if self._tokens is not None:
            for index, text in enumerate(texts):
                if self._tokens.search(text):
                    rows[index] = [token for _, tokens, _ in self._parts(text) for token in tokens]
        return TokenBatch.from_lists(rows).wrapped(self.before, self.after)

    def round_trip(self, text: str) -> RoundTrip:
        parts = list(self._parts(text))
        text, spelled = ("".join(strings) for strings in ((part for part, _, _ in parts), (back for _, _, back in parts)))
        same = spelled == text or self.processor.normalize(spelled) == self.processor.normalize(text)
        return RoundTrip(text, spelled, same, any(self.processor.unk_id() in tokens for _, tokens, _ in parts))

    def _parts(self, text: str) -> Iterator[tuple[str, list[int], str]]:
        """The special tokens in `text`, and the texts between them: each with its tokens and with what these spell."""
        strings = [text] if self._tokens is None else self._tokens.split(text)
        for index, string in enumerate(strings):
            if index % 2:
                yield string, [self._ids[string]], string
                continue
            if index and (token := self._stripping.get(strings[index - 1])) and token.rstrip:
                string = string.lstrip()
            if index + 1 < len(strings) and (token := self._stripping.get(strings[index + 1])) and token.lstrip:
                string = string.rstrip()
            processor = self._later if index else self.processor
            tokens = processor.encode(string)
            yield string, tokens, processor.decode(tokens)

    def _piece(self, name: str) -> int | None:
        """The id of a piece, or None if the model has no such piece."""
        index = self.processor.piece_to_id(name)
        return index if self.processor.id_to_piece(index) == name else None

    def _token(self, name: str | None, own: int) -> int | None:
        """The id of the token that the files beside the model name, or else of the model's `own`, which is -1 if it has none."""
        if name is not None:
            return self._ids.get(name)
        return None if own < 0 else own


def _one_of(tokens: Iterable[tokenizers.AddedToken], ids: Iterable[str]) -> re.Pattern | None:
    """A pattern with one group, which finds the special tokens `ids`. The longest counts. `tokens` say which are whole words only."""
    words = {token.content for token in tokens if token.single_word}
    longest_first = sorted(ids, key=len, reverse=True)
    alternatives = (rf"(?<!\w){re.escape(name)}(?!\w)" if name in words else re.escape(name) for name in longest_first)
    return re.compile(f"({'|'.join(alternatives)})") if longest_first else None
