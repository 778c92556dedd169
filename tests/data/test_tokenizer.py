"""Tokenizers compared with transformers and sentencepiece, which get one text at a time; when gigatoken is used and when not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from maskllm.data import gigatoken_tokenizer as module
from maskllm.data.tokenizer import load_tokenizer
from maskllm.data.tokens import TokenBatch
from maskllm.errors import MaskLLMError
from tests.conftest import LFS_POINTER, real_data

from .conftest import passages, read_with_library


def rows(batch: TokenBatch) -> list[list[int]]:
    """The tokens of each text."""
    assert batch.ids.dtype == np.int32
    return [row.tolist() for row in np.split(batch.ids, np.cumsum(batch.lengths)[:-1])]


@pytest.mark.parametrize(
    ("name", "library"),
    [("gigatoken", "gigatoken"), ("bos", "gigatoken"), ("digits", "tokenizers"), ("tokenizer.model", "gigatoken")],
)
@pytest.mark.parametrize("use_gigatoken", [True, False])
def test_tokens_are_those_of_the_tokenizers_own_library(tokenizers_directory, corpus, reference, name, library, use_gigatoken):
    tokenizer = load_tokenizer(tokenizers_directory / name, use_gigatoken=use_gigatoken)
    if use_gigatoken:
        assert tokenizer.library == library
    else:
        assert tokenizer.library == ("sentencepiece" if name == "tokenizer.model" else "tokenizers")
    expected = reference(name)
    assert rows(tokenizer.encode_batch(corpus)) == expected.rows
    assert len(tokenizer.encode_batch([]).lengths) == 0
    assert tokenizer.vocab_size == expected.vocab_size == (420 if name == "tokenizer.model" else 600)
    assert tokenizer.eod == expected.eod == (2 if name == "tokenizer.model" else 1)


@pytest.mark.parametrize("name", ["gigatoken", "tokenizer.model"])
def test_gigatoken_is_exact_for_a_long_text(tokenizers_directory, name):
    texts = [" ".join(passages(400, seed=3))]
    tokenizer = load_tokenizer(tokenizers_directory / name)
    assert tokenizer.library == "gigatoken"
    assert rows(tokenizer.encode_batch(texts)) == read_with_library(tokenizers_directory / name, texts).rows


def test_gigatoken_is_exact_for_llama2s_tokenizer():
    with real_data("c4-sample.train.json").open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    tokenizer = load_tokenizer(real_data("llama2-tokenizer.model"))
    assert tokenizer.library == "gigatoken"
    assert rows(tokenizer.encode_batch(texts)) == read_with_library(real_data("llama2-tokenizer.model"), texts).rows


@pytest.mark.parametrize(("token", "dropout"), [({"lstrip": True}, None), ({"single_word": True}, None), ({}, 0.1)])
def test_a_feature_that_gigatoken_treats_differently_selects_the_own_library(tokenizers_directory, tmp_path, token, dropout):
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizers_directory / "gigatoken" / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("word", **token)])
    tokenizer.model.dropout = dropout
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").library == "tokenizers"


class WrongGigatoken:
    """gigatoken with wrong tokens for texts that contain a word."""

    def __init__(self, tokenizer, word: str) -> None:
        self.tokenizer, self.word = tokenizer, word

    def encode_batch(self, texts, parallel):
        return self.tokenizer.encode_batch([text.replace(self.word, "?") for text in texts], parallel=parallel)


def test_a_gigatoken_that_is_wrong_on_the_probes_is_not_used(tokenizers_directory, monkeypatch):
    from_json = module.gigatoken.Tokenizer.from_json
    monkeypatch.setattr(module.gigatoken.Tokenizer, "from_json", lambda contents: WrongGigatoken(from_json(contents), "2024"))
    assert load_tokenizer(tokenizers_directory / "gigatoken").library == "tokenizers"


def test_a_gigatoken_that_is_wrong_later_raises(tokenizers_directory):
    tokenizer = load_tokenizer(tokenizers_directory / "gigatoken")
    tokenizer._tokenizer = WrongGigatoken(tokenizer._tokenizer, "mask")
    with pytest.raises(module.InexactError):
        for seed in range(20):
            tokenizer.encode_batch(passages(3, seed))


def test_wrapped_is_list_concatenation():
    texts = [[5, 6], [], [7], [], []]
    batch = TokenBatch.from_lists(texts)
    assert rows(batch.wrapped([1, 2], [3])) == [[1, 2, *text, 3] for text in texts]
    assert rows(batch.wrapped(after=[3], empty=False)) == [[*text, 3] if text else [] for text in texts]
    assert rows(TokenBatch.from_lists([[], []]).wrapped([1])) == [[1], [1]]


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "missing", "no such tokenizer"),
        ({"d/readme": "x"}, "d", r"no tokenizer.json and no tokenizer.model"),
        ({"tokenizer.json": "{"}, "tokenizer.json", "not a readable Hugging Face tokenizer"),
        ({"tokenizer.json": "{}"}, "tokenizer.json", "not a readable Hugging Face tokenizer"),
        ({"x.model": "garbage"}, "x.model", "not a readable SentencePiece model"),
        ({"x.model": ""}, "x.model", "not a readable SentencePiece model"),
    ],
)
def test_a_path_without_a_tokenizer_is_refused(tmp_path, files, name, message):
    for file, contents in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(contents)
    with pytest.raises(MaskLLMError, match=message) as error:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_vocabulary_with_gaps_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "b": 70000}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MaskLLMError, match="token 70000 lies outside the 2 tokens"):
        load_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "merges.txt"])
def test_a_git_lfs_pointer_is_told_by_name(name, tmp_path):
    if name == "tokenizer_config.json":
        Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(MaskLLMError, match=f"{name}: is a git-lfs pointer, not the file itself"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_a_git_lfs_pointer_is_told_by_name(name, tmp_path):
    (tmp_path / name).write_text(LFS_POINTER)
    with pytest.raises(MaskLLMError, match=f"{name}: is a git-lfs pointer, not the file itself"):
        load_tokenizer(tmp_path / name)
