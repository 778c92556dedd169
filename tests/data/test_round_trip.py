"""What `preprocess` says about a tokenizer whose tokens do not spell the text."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from maskllm.cli import main
from maskllm.data.preprocess import preprocess
from maskllm.data.round_trip import Fidelity, RoundTrip
from maskllm.errors import MaskLLMError

from .conftest import write_json_lines

LETTERS = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
TEXTS = ["Hello world, the mask", " two  spaces\n and a line", "é 夜", "word"]


def byte_level(pre_tokenizer=None, normalizer=None, decoder=True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=LETTERS, merges=[]))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = own if pre_tokenizer is None else pre_tokenizers.Sequence([pre_tokenizer, own])
    if decoder:
        tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def warnings(tokenizer: Tokenizer, tmp_path, texts=TEXTS) -> list[str]:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = write_json_lines(tmp_path / "in.json", texts)
    return preprocess([source], tmp_path / "out", tmp_path / "tokenizer.json", workers=1).warnings


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase()])
@pytest.mark.parametrize("decoder", [True, False])
def test_what_the_normalizer_documents_is_no_change(tmp_path, normalizer, decoder):
    assert warnings(byte_level(normalizer=normalizer, decoder=decoder), tmp_path) == []


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("pre_tokenizer", [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(" ", "removed")])
def test_a_tokenizer_that_drops_the_spaces_is_refused(tmp_path, capsys, pre_tokenizer, decoder):
    byte_level(pre_tokenizer, decoder=decoder).save(str(tmp_path / "tokenizer.json"))
    source = write_json_lines(tmp_path / "in.json", TEXTS)
    arguments = ["--output-prefix", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["preprocess", "--input", str(source), *arguments]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert f"{tmp_path / 'tokenizer.json'}: its tokens do not keep the spaces between words ('Hello world" in line
    assert not list(tmp_path.glob("out*"))


def test_a_byte_level_vocabulary_behind_metaspace_is_refused(tmp_path):
    """What transformers 5.3.0 made of a byte-level tokenizer.json of the class LlamaTokenizer."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    with pytest.raises(MaskLLMError, match="do not keep the spaces"):
        warnings(tokenizer, tmp_path)


def test_a_normalizer_that_removes_the_spaces_is_refused(tmp_path):
    with pytest.raises(MaskLLMError, match="do not keep the spaces"):
        warnings(byte_level(normalizer=normalizers.Replace(" ", "")), tmp_path, TEXTS[:1])


def test_unknown_characters_are_a_warning(tmp_path, capsys):
    for unknown in ("<unk>", None):  # without an unknown token the model drops the character
        tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1, "b": 2, "▁": 3}, merges=[], unk_token=unknown))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        (line,) = warnings(tokenizer, tmp_path, ["a b a", "a bé a", "b"])
        assert line.startswith(
            f"{tmp_path / 'tokenizer.json'}: in 1 of 3 sampled passages characters are not in the vocabulary ('a bé a'"
        )
    arguments = ["--output-prefix", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["preprocess", "--input", str(tmp_path / "in.json"), *arguments]) == 0
    assert f"maskllm preprocess: warning: {line}" in capsys.readouterr().err


def test_white_space_and_letters_that_change_are_warnings(tmp_path):
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    (line,) = warnings(tokenizer, tmp_path, ["a b", "a\nb  a"])
    assert "in 1 of 2 sampled passages the tokens spell other white space ('a\\nb  a' becomes 'a b a')" in line
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("w", "v")])
    (line,) = warnings(tokenizer, tmp_path, ["hello world"])
    assert "the tokens spell other text ('hello world' becomes 'hello vorld')" in line


def test_special_tokens_in_a_text_change_nothing(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    assert warnings(tokenizer, tmp_path, ["a</s> b", "</s>"]) == []


def test_spaces_count_as_lost_if_more_than_half_of_them_are():
    def fidelity(*pairs):
        found = Fidelity()
        found.add(RoundTrip(text, spelled, text == spelled, False) for text, spelled in pairs)
        return found

    fidelity(("a b", "ab"), ("a b", "a b")).check("t")
    with pytest.raises(MaskLLMError, match=r"^t: .*\('a b c' becomes 'ab c'\)"):
        fidelity(("a b c", "ab c"), ("a b c", "abc")).check("t")
    fidelity(("a b c", "a b c d e f"), ("a b", "ab")).check("t")


def test_the_summary_in_json_has_the_warnings(tmp_path, tokenizers_directory):
    source = write_json_lines(tmp_path / "in.json", TEXTS)
    for name in ("digits", "tokenizer.model"):
        arguments = ["--output-prefix", str(tmp_path / "out"), "--json", str(tmp_path / "numbers.json")]
        assert main(["preprocess", "--input", str(source), "--tokenizer", str(tokenizers_directory / name), *arguments]) == 0
        assert json.loads((tmp_path / "numbers.json").read_text())["warnings"] == []
