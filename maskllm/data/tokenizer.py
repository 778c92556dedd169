"""Tokenizers, from the files of the model itself: `tokenizer.json` and SentencePiece's `tokenizer.model`.

The library that defines a file's format reads it, so that the tokens do not depend on the version of transformers. A
`tokenizer.json` is read by tokenizers and gives what its post-processor adds, as `tokenizer(text).input_ids` of transformers and
Megatron-LM's `_HuggingFaceTokenizer` do (since megatron-core 0.15 with `--tokenizer-hf-include-special-tokens`). A SentencePiece
model gives BOS and the text's pieces, as Megatron-LM's `_Llama2Tokenizer` does. transformers reads what has neither file.

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
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import awkward
import gigatoken
import numpy as np
import sentencepiece
import tokenizers
from tokenizers import processors

from maskllm.data.round_trip import RoundTrip
from maskllm.data.tokenizer_files import FILE_NAMES, TokenizerFiles, read_json_if_there, read_tokenizer_files
from maskllm.errors import MaskLLMError, whole_message
from maskllm.files import check_not_lfs_pointer


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


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library tokenizers."""

    library = "tokenizers"

    def __init__(self, path: Path, backend: tokenizers.Tokenizer, eod: int | None) -> None:
        """Encode with `backend`, which was read from `path`. Raises MaskLLMError if its ids have gaps."""
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eod = eod
        self.special_tokens = [token.content for token in backend.get_added_tokens_decoder().values()]
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= self.vocab_size:
            raise MaskLLMError(
                f"{path}: token {largest} lies outside the {self.vocab_size} tokens of the vocabulary; its ids must have no gaps"
            )
        self._unknown = getattr(backend.model, "unk_token", None)

    def encode_batch(self, texts: list[str]) -> TokenBatch:
        return TokenBatch.from_lists([encoding.ids for encoding in self.backend.encode_batch_fast(texts)])

    def round_trip(self, text: str) -> RoundTrip:
        encoding = self.backend.encode(text, add_special_tokens=False)
        if self.backend.decoder is None:  # the spelling is not known, but whether spaces make a difference is
            squeezed = text.replace(" ", "")
            pieces = self.backend.encode(squeezed, add_special_tokens=False).tokens
            spelled = squeezed if "".join(pieces) == "".join(encoding.tokens) else text
        else:
            spelled = self.backend.decode(encoding.ids, skip_special_tokens=False)
        normalizer = self.backend.normalizer
        same = spelled == text or (normalizer is not None and normalizer.normalize_str(spelled) == normalizer.normalize_str(text))
        return RoundTrip(text, spelled, same, self._unknown is not None and self._unknown in encoding.tokens)


def read_tokenizer_json(path: Path, files: TokenizerFiles) -> HuggingFaceTokenizer:
    """The tokenizer in a `tokenizer.json`, with what the `files` beside it say.

    `tokenizer.json` decides about everything that is in it. The other files name the end-of-sequence token, add tokens, and say by
    `add_bos_token` and `add_eos_token` whether every text begins with BOS and ends with EOS; transformers does the same.

    Raises MaskLLMError if the file cannot be read, or if the files disagree on the id of a token that is to be added.
    """
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise MaskLLMError(f"{path}: not a readable Hugging Face tokenizer: {whole_message(error)}") from error
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for index, token in sorted(files.added_tokens.items()):
        if token.content not in known:
            backend.add_tokens([token])
            if (found := backend.token_to_id(token.content)) != index:
                raise MaskLLMError(
                    f"{path}: gives token {token.content!r} the id {found}, and {files.directory} lists it with id {index}; "
                    "use the files of one model"
                )
    bos, eos = (
        (index if index is not None and backend.id_to_token(index) else None) if name is None else backend.token_to_id(name)
        for name, index in ((files.bos_token, files.bos_id), (files.eos_token, files.eos_id))
    )
    with contextlib.suppress(InexactError):
        before, after = _added_around(backend)
        outwards = _switched(before[::-1], bos, files.add_bos), _switched(after, eos, files.add_eos)
        if outwards != (before[::-1], after):
            names = [[backend.id_to_token(token) for token in tokens] for tokens in (outwards[0][::-1], outwards[1])]
            added = {name: backend.token_to_id(name) for name in names[0] + names[1]}
            backend.post_processor = processors.TemplateProcessing(
                single=[*names[0], "$A", *names[1]], special_tokens=list(added.items())
            )
    return HuggingFaceTokenizer(path, backend, eos)


def _switched(tokens: list[int], token: int | None, wanted: bool | None) -> list[int]:
    """`tokens`, with `token` at the end or without it, as is `wanted`. If either is None, nothing changes."""
    if token is None or wanted is None or (token in tokens) == wanted:
        return tokens
    return [*tokens, token] if wanted else [other for other in tokens if other != token]


def read_with_transformers(directory: Path) -> HuggingFaceTokenizer:
    """The tokenizer that transformers makes of a directory without `tokenizer.json` and SentencePiece model.

    The model's config is not read but for `model_type`, so that it need not pass the checks of transformers. Raises MaskLLMError if
    transformers cannot read the directory, or has no tokenizer of the library tokenizers for it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig

    model_type = read_json_if_there(directory / "config.json").get("model_type")
    try:
        config = AutoConfig.for_model(model_type) if model_type in CONFIG_MAPPING else PretrainedConfig()
        tokenizer = AutoTokenizer.from_pretrained(directory, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise many types, even plain Exception
        raise MaskLLMError(f"{directory}: not a readable Hugging Face tokenizer: {whole_message(error)}") from error
    if not tokenizer.is_fast:
        raise MaskLLMError(f"{directory}: {type(tokenizer).__name__} has no tokenizer.json; convert it to a fast tokenizer")
    return HuggingFaceTokenizer(directory, tokenizer.backend_tokenizer, tokenizer.eos_token_id)


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
                self._before, self._after = _added_around(reference.backend)
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


VOCABULARIES = ("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.bpe.model", "*.tiktoken", "tekken.json")
"""Files from which transformers can make a tokenizer if there is no `tokenizer.json` and no `tokenizer.model`."""


def load_tokenizer(path: str | os.PathLike, *, use_gigatoken: bool = True) -> Tokenizer:
    """Read a tokenizer from a Hugging Face directory or tokenizer.json, or a SentencePiece tokenizer.model.

    In a directory, tokenizer.json comes first, then tokenizer.model. transformers reads a directory with other vocabulary files, and
    a tokenizer.model in tiktoken's format. A file with one of these two names is read as its directory is: with the
    tokenizer_config.json and the other files beside it. Raises MaskLLMError for anything else, and for a git-lfs pointer.
    """
    path = Path(path)
    if not path.exists():
        raise MaskLLMError(f"{path}: no such tokenizer; wanted a directory with tokenizer.json, or a tokenizer.model file")
    reference = _read_directory(path) if path.is_dir() else _read_file(path)
    if use_gigatoken:
        with contextlib.suppress(InexactError):
            return GigatokenTokenizer(reference)
    return reference


def _read_directory(directory: Path) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    for name in FILE_NAMES:
        if (directory / name).exists():
            return _read_file(directory / name)
    vocabularies = [file for pattern in VOCABULARIES for file in directory.glob(pattern)]
    if not vocabularies:
        raise MaskLLMError(f"{directory}: no tokenizer.json and no tokenizer.model in this directory, and no other vocabulary")
    for file in vocabularies:
        check_not_lfs_pointer(file)
    return read_with_transformers(directory)


def _read_file(path: Path) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    check_not_lfs_pointer(path)
    files = read_tokenizer_files(path.parent) if path.name in FILE_NAMES else TokenizerFiles(path.parent)
    if path.suffix != ".model":
        return read_tokenizer_json(path, files)
    if files.found and _is_tiktoken(path):
        return read_with_transformers(path.parent)
    return SentencePieceTokenizer(path, files)


def _is_tiktoken(path: Path) -> bool:
    """Whether the file has lines of a token in base64 and its rank."""
    with path.open("rb") as stream:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+\s*", stream.readline(1000)) is not None


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


def _added_around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that the post-processor puts before and after a text. Raises InexactError if it does anything else."""
    alone = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
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
