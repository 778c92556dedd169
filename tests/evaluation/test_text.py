"""Evaluation texts: the number of tokens that papers state for WikiText-2, and how each kind of file is read."""

from __future__ import annotations

import gzip
import json

import pytest

from maskllm.data.json_lines import BadLineError
from maskllm.data.text_files import zstd
from maskllm.data.tokenizer import load_tokenizer
from maskllm.errors import MaskLLMError
from maskllm.evaluation.text import read_evaluation_text
from tests.conftest import real_data


@pytest.mark.parametrize("use_gigatoken", [False, True])
def test_wikitext_2_raw_has_the_papers_341469_tokens(use_gigatoken):
    read = read_evaluation_text(real_data("wikitext-2-raw.test.txt"))
    assert read.kind == "wikitext rows"
    tokenizer = load_tokenizer(real_data("llama2-tokenizer.model"), use_gigatoken=use_gigatoken)
    assert len(tokenizer.encode(read.text)) == 341469


def test_wikitext_rows_are_joined_as_the_datasets_library_gives_them(tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" \n = Title = \n \n First @-@ text . \n Second . \n")
    read = read_evaluation_text(tmp_path / "wiki.test.raw")
    assert read.text == "\n\n".join(["", " = Title = \n", "", " First @-@ text . \n", " Second . \n"])
    assert read.kind == "wikitext rows"


@pytest.mark.parametrize("name", ["text.txt", "noend.txt", "TEXT.GZ", "braces.json"])
def test_other_text_is_read_unchanged(tmp_path, name):
    text = ("{{Braces}}" if name == "braces.json" else "Any") + " text,\n in lines \n\n and é."
    text += "" if name == "noend.txt" else "\n"
    data = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name == "TEXT.GZ" else data)
    assert (read_evaluation_text(tmp_path / name).text, read_evaluation_text(tmp_path / name).kind) == (text, "text")


@pytest.mark.parametrize("name", ["held.json", "held.ndjson", "held", "held.json.gz", "C4.JSON.GZ", "held.zst"])
def test_json_lines_are_joined_by_blank_lines(tmp_path, name):
    data = b"".join(json.dumps({"text": text, "url": ""}).encode() + b"\n" for text in ("one é", "two\nlines", "three"))
    data = b"\xef\xbb\xbf\n \n" + data
    data = gzip.compress(data) if name.lower().endswith("gz") else zstd.compress(data) if name.endswith("zst") else data
    (tmp_path / name).write_bytes(data)
    read = read_evaluation_text(tmp_path / name)
    assert (read.text, read.kind) == ("one é\n\ntwo\nlines\n\nthree", "json lines")


@pytest.mark.parametrize("first", [b'{"body": "y"}', b'[{"text": "y"}]', b'{"text": "cut', b'{\n"text": "y"}', b'{"text": 3}'])
def test_malformed_json_lines_are_not_read_as_text(tmp_path, first):
    (tmp_path / "held").write_bytes(b"\n" + first + b"\n")
    with pytest.raises(BadLineError, match=r"held:2: "):
        read_evaluation_text(tmp_path / "held")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_bytes(b" \n\n")
    (tmp_path / "bad.json").write_bytes(b'{"text": "x"}\n{"body": "y"}\n')
    with pytest.raises(MaskLLMError, match=r"latin.txt: not UTF-8: byte 0xe9 at offset 3"):
        read_evaluation_text(tmp_path / "latin.txt")
    with pytest.raises(MaskLLMError, match=r"blank.txt: no text"):
        read_evaluation_text(tmp_path / "blank.txt")
    with pytest.raises(BadLineError, match=r"bad.json:2: no key 'text'"):
        read_evaluation_text(tmp_path / "bad.json")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"text\n" * 9)[:-9])
    with pytest.raises(MaskLLMError, match=r"cut.gz: the gzip stream is damaged or cut off"):
        read_evaluation_text(tmp_path / "cut.gz")
    with pytest.raises(MaskLLMError, match=r"is a directory; wanted a file$"):
        read_evaluation_text(tmp_path)
