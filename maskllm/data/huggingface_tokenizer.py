"""Tokenizers of the library tokenizers: `tokenizer.json`, and what transformers makes of other files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import processors

from maskllm.data.round_trip import RoundTrip
from maskllm.data.tokenizer_files import TokenizerFiles, read_json_if_there
from maskllm.data.tokens import TokenBatch, Tokenizer
from maskllm.errors import MaskLLMError, whole_message


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
    if (around := added_around(backend)) is not None:
        before, after = around
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

    Of the model's config only `model_type` is read, so the config need not pass the checks of transformers. Raises MaskLLMError if
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


def added_around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """The tokens that the post-processor puts before and after a text; None if it does anything else."""
    alone = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    for start in range(len(whole) - len(alone) + 1):
        if whole[start : start + len(alone)] == alone:
            return whole[:start], whole[start + len(alone) :]
    return None


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
