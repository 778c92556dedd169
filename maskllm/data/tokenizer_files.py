"""The small JSON files beside a tokenizer, which name its special tokens: `tokenizer_config.json` and others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from maskllm.errors import MaskLLMError
from maskllm.files import read_json_object

FILE_NAMES = ("tokenizer.json", "tokenizer.model")
"""The files of a tokenizer in a Hugging Face directory. The first that is there is read."""
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
"""The keys of special tokens in `tokenizer_config.json` and `special_tokens_map.json`."""
LISTS = ("additional_special_tokens", "extra_special_tokens")
"""The keys of lists of further special tokens."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What the files beside a tokenizer say about it. Without such files, the defaults."""

    directory: Path
    found: bool = False
    """Whether there is a `tokenizer_config.json`, `special_tokens_map.json` or `added_tokens.json`."""
    bos_token: str | None = None
    eos_token: str | None = None
    bos_id: int | None = None
    """From the model's config.json. It counts if `bos_token` is None."""
    eos_id: int | None = None
    named_tokens: list[str] = field(default_factory=list)
    """All special tokens that have a name, such as `pad_token`, or stand in a list."""
    added_tokens: Mapping[int, AddedToken] = field(default_factory=dict)
    """Tokens that were added to the vocabulary, by id. Some are in the vocabulary."""
    add_bos: bool | None = None
    """Whether every text begins with BOS. None: the files do not say it."""
    add_eos: bool | None = None
    legacy: bool | None = None
    """The setting of transformers' LlamaTokenizer. False: text after a special token gets no leading space."""


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Read `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and the ids in `config.json`.

    The first two name special tokens; `tokenizer_config.json` counts if both name one. The tokens in its `added_tokens_decoder`
    replace those of `added_tokens.json`, which older versions of transformers wrote. Raises MaskLLMError if a file is not a JSON
    object of the expected form.
    """
    config, names, added = (
        read_json_if_there(directory / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map", "added_tokens")
    )
    model = read_json_if_there(directory / "config.json")
    try:
        special = {key: _content(value) for key in NAMES if (value := config.get(key) or names.get(key))}
        further = [_content(token) for key in LISTS for token in _listed(config.get(key) or names.get(key) or ())]
        named = [*special.values(), *further]
        if decoder := config.get("added_tokens_decoder"):
            tokens = {int(index): _added_token(token) for index, token in decoder.items()}
        else:
            tokens = {int(index): AddedToken(token, special=token in named, normalized=False) for token, index in added.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MaskLLMError(
            f"{directory / 'tokenizer_config.json'}: its special tokens cannot be read ({type(error).__name__}: {error})"
        ) from error
    return TokenizerFiles(
        directory,
        found=bool(config or names or added),
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        bos_id=_id(model.get("bos_token_id")),
        eos_id=_id(model.get("eos_token_id")),
        named_tokens=named,
        added_tokens=tokens,
        add_bos=_switch(config.get("add_bos_token")),
        add_eos=_switch(config.get("add_eos_token")),
        legacy=_switch(config.get("legacy")),
    )


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file. Raises MaskLLMError if it holds something else."""
    return read_json_object(path) if path.is_file() else {}


def _content(token: str | dict[str, Any]) -> str:
    """The string of a token, which may be written as an object."""
    found = token["content"] if isinstance(token, dict) else token
    if not isinstance(found, str):
        raise TypeError(f"found {token!r}, wanted a token")
    return found


def _listed(tokens: list | dict) -> list:
    """`extra_special_tokens` is a list or, in some versions of transformers, an object of name and token."""
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens)


def _added_token(token: dict[str, Any]) -> AddedToken:
    """A token of `added_tokens_decoder`."""
    keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(token["content"], **{key: bool(token[key]) for key in keys if key in token})


def _id(value: Any) -> int | None:
    """A token id of config.json. If a list ends a text, the first counts."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _switch(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None
