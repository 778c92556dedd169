"""Pre-tokenization, compared byte for byte with Megatron's IndexedDatasetBuilder, which gets one document at a time; bad input."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from maskllm.cli import main
from maskllm.data import preprocess as module
from maskllm.data.gigatoken_tokenizer import GigatokenTokenizer, InexactError
from maskllm.data.json_lines import BadLineError
from maskllm.data.preprocess import preprocess
from maskllm.data.text_files import zstd
from maskllm.errors import MaskLLMError
from tests.conftest import LFS_POINTER

from .conftest import Reference, passages, read_with_library, write_hf_tokenizer, write_json_lines


def files(prefix: Path) -> tuple[bytes, bytes]:
    """The contents of a dataset's two files."""
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def megatron_files(reference: Reference, prefix: Path, append_eod: bool) -> tuple[bytes, bytes]:
    """The files that Megatron-LM's tool writes: one document at a time, its tokens, then EOD if it has tokens."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(reference.vocab_size))
    for row in reference.rows:
        tokens = [*row, reference.eod] if row and append_eod else row
        builder.add_document(tokens, [len(tokens)] if tokens else [])
    builder.finalize(f"{prefix}.idx")
    return files(prefix)


@pytest.mark.parametrize("append_eod", [False, True])
@pytest.mark.parametrize("name", ["gigatoken", "bos", "digits", "tokenizer.model"])
def test_files_are_megatrons_byte_for_byte(tokenizers_directory, corpus, reference, tmp_path, monkeypatch, name, append_eod):
    monkeypatch.setattr(module, "CHUNK_BYTES", 3000)  # so that there are many chunks, and lines that are longer than a chunk
    source = write_json_lines(tmp_path / "in.json", corpus)
    summary = preprocess([source], tmp_path / "out", tokenizers_directory / name, append_eod=append_eod, workers=3)
    assert files(tmp_path / "out_text_document") == megatron_files(reference(name), tmp_path / "expected", append_eod)
    dataset = IndexedDataset(summary.prefix)
    assert (len(dataset.document_indices) - 1, dataset.sequence_lengths.sum()) == (summary.documents, summary.tokens)
    assert summary.documents == len(corpus)
    assert summary.empty_documents == (0 if name in ("bos", "tokenizer.model") else 1)
    assert summary.input_bytes == source.stat().st_size
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith((".", "out"))) == [
        "out_text_document.bin",
        "out_text_document.idx",
    ]


def test_large_vocabularies_are_int32(tmp_path):
    path = write_hf_tokenizer(tmp_path / "big", vocab_size=65500)
    texts = passages(5)
    source = write_json_lines(tmp_path / "in.json", texts)
    summary = preprocess([source], tmp_path / "out", path, workers=1)
    expected = megatron_files(read_with_library(path, texts), tmp_path / "expected", False)
    assert files(tmp_path / "out_text_document") == expected
    dataset = IndexedDataset(summary.prefix)  # keep it while its arrays are used: they are views of the file
    assert dataset[0].dtype == np.int32


def test_compression_byte_order_mark_crlf_and_blank_lines_change_nothing(tokenizers_directory, corpus, tmp_path):
    plain = write_json_lines(tmp_path / "plain.json", corpus)
    lines = plain.read_bytes().splitlines()
    with gzip.open(tmp_path / "a.json.gz", "wb") as stream:
        stream.write(b"\xef\xbb\xbf" + b"\r\n".join(lines[:60]) + b"\r\n\r\n")
    with (tmp_path / "b.data").open("wb") as stream:  # two gzip members, no .gz in the name, and no line end at the end
        stream.write(gzip.compress(b"\n".join(lines[60:80])) + gzip.compress(b"\n \n" + b"\n".join(lines[80:100])))
    with (tmp_path / "c.jsonl.zst").open("wb") as stream:  # a frame to skip, as pzstd writes first, and two frames
        stream.write(b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip")
        stream.write(zstd.compress(b"\n".join(lines[100:120]) + b"\n") + zstd.compress(b"\n" + b"\n".join(lines[120:140])))
    (tmp_path / "d.json").write_bytes(b"\n".join(lines[140:]))
    for inputs, output in (
        ([plain], "one"),
        ([tmp_path / name for name in ("a.json.gz", "b.data", "c.jsonl.zst", "d.json")], "four"),
    ):
        preprocess(inputs, tmp_path / output, tokenizers_directory / "digits", workers=2)
    assert files(tmp_path / "one_text_document") == files(tmp_path / "four_text_document")


def test_the_dataset_is_named_for_the_key(tokenizers_directory, tmp_path):
    (tmp_path / "in.json").write_text('{"body": "the model", "text": 3}\n')
    summary = preprocess([tmp_path / "in.json"], tmp_path / "out", tokenizers_directory / "digits", json_key="body", workers=1)
    assert summary.prefix == str(tmp_path / "out_body_document")
    dataset = IndexedDataset(summary.prefix)
    assert dataset[0].tolist() == AutoTokenizer.from_pretrained(tokenizers_directory / "digits")("the model").input_ids


BAD_LINES = {
    b'{"text": "cut off': "not JSON",
    b"[" * 100000: "not JSON",
    b'["text"]': "a JSON array, wanted an object",
    b"null": "a JSON null, wanted an object",
    b'{"body": "x", "url": 3}': r"no key 'text' \(it has 'body', 'url'\)",
    b'{"text": ["a", "b"]}': "'text' is a JSON array, wanted a string",
    b'{"text": null}': "'text' is a JSON null, wanted a string",
    b'{"text": 12}': "'text' is a JSON number, wanted a string",
    b'{"text": "na\xefve"}': "not UTF-8: byte 0xef at offset 12",
    b'{"text": "\\ud83d alone"}': r"half of a surrogate pair, \\ud83d",
    b'{"text": "a"} {"text": "b"}': "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=list(BAD_LINES.values()))
def test_a_bad_line_is_named_and_nothing_is_written(tokenizers_directory, tmp_path, line):
    (tmp_path / "in.json").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(BadLineError, match=BAD_LINES[line]) as error:
        preprocess([tmp_path / "in.json"], tmp_path / "out", tokenizers_directory / "digits", workers=2)
    assert str(error.value).startswith(f"{tmp_path / 'in.json'}:3: ") and "--skip-bad-lines" in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.json"]


def test_bad_lines_are_skipped_counted_and_reported(tokenizers_directory, tmp_path, capsys):
    good = passages(len(BAD_LINES))
    pairs = zip(BAD_LINES, good, strict=True)
    (tmp_path / "in.json").write_bytes(b"".join(line + b"\n" + json.dumps({"text": t}).encode() + b"\n" for line, t in pairs))
    write_json_lines(tmp_path / "good.json", good)
    tokenizer = str(tokenizers_directory / "digits")
    arguments = ["--tokenizer", tokenizer, "--workers", "2", "--skip-bad-lines", "--json", str(tmp_path / "numbers.json")]
    assert main(["preprocess", "--input", str(tmp_path / "in.json"), "--output-prefix", str(tmp_path / "out"), *arguments]) == 0
    preprocess([tmp_path / "good.json"], tmp_path / "expected", tokenizer, workers=1)
    assert files(tmp_path / "out_text_document") == files(tmp_path / "expected_text_document")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert (numbers["documents"], numbers["bad_lines"]) == (len(good), len(BAD_LINES))
    reported = capsys.readouterr().err
    for number in range(1, 2 * len(BAD_LINES), 2):
        assert f"{tmp_path / 'in.json'}:{number}: " in reported


def failing_inputs(root: Path) -> dict[str, tuple[list[str], str]]:
    document = b'{"text": "the model"}\n'
    whole = gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in passages(50)))
    (root / "good.json").write_bytes(document)
    (root / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    (root / "damaged.json.gz").write_bytes(whole[:200] + bytes(50) + whole[250:])
    (root / "cut.json.zst").write_bytes(zstd.compress(document * 50)[:-1])
    (root / "table.csv").write_bytes(b"text\nthe model\n")
    (root / "table.parquet").write_bytes(b"PAR1\x15\x04PAR1")
    (root / "pointer.json").write_bytes(LFS_POINTER.encode())
    (root / "empty.json").write_bytes(b"\n")
    (root / "no_text.json").write_bytes(b'{"text": ""}\n')
    (root / "folder").mkdir()
    os.mkfifo(root / "pipe")
    return {
        "missing": (["missing.json"], "missing.json: no such file"),
        "folder": (["folder"], "folder: is a directory"),
        "pipe": (["pipe"], "pipe: is not a regular file"),
        "cut": (["good.json", "cut.json.gz"], "cut.json.gz: the gzip stream is damaged or cut off after line"),
        "damaged": (["damaged.json.gz"], "damaged.json.gz: the gzip stream is damaged or cut off after line"),
        "cut zst": (["good.json", "cut.json.zst"], "cut.json.zst: the Zstandard stream is damaged or cut off after line"),
        "not JSON lines": (
            ["good.json", "table.csv", "good.json"],
            "table.csv: no line holds a document, wanted JSON lines; the first ",
        ),
        "parquet": (["good.json", "table.parquet"], "table.parquet: is a Parquet file; wanted text"),
        "pointer": (["good.json", "pointer.json"], "pointer.json: is a git-lfs pointer"),
        "empty": (["empty.json"], "no document with text"),
        "no_text": (["no_text.json"], "no document with text"),
    }


@pytest.mark.parametrize(
    "case",
    ["missing", "folder", "pipe", "cut", "damaged", "cut zst", "not JSON lines", "parquet", "pointer", "empty", "no_text"],
)
def test_an_input_that_cannot_be_used_ends_with_one_line(tokenizers_directory, tmp_path, capsys, case):
    names, message = failing_inputs(tmp_path)[case]
    before = {entry.name for entry in tmp_path.iterdir()}
    arguments = ["--output-prefix", str(tmp_path / "out"), "--tokenizer", str(tokenizers_directory / "digits")]
    assert main(["preprocess", "--input", *(str(tmp_path / name) for name in names), *arguments, "--skip-bad-lines"]) == 1
    last = capsys.readouterr().err.rstrip("\n").splitlines()[-1]
    assert last.startswith("maskllm preprocess: error: ") and message in last
    assert {entry.name for entry in tmp_path.iterdir()} == before


def test_a_run_that_fails_leaves_no_directory(tokenizers_directory, tmp_path):
    write_json_lines(tmp_path / "in.json", ["the model"])
    with pytest.raises(BadLineError, match="no key 'a/b'"):
        preprocess([tmp_path / "in.json"], tmp_path / "out", tokenizers_directory / "digits", json_key="a/b")
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.json"]


def test_a_dataset_of_links_goes_where_they_point(tokenizers_directory, tmp_path):
    (tmp_path / "disk").mkdir()
    for suffix in ("bin", "idx"):
        (tmp_path / "disk" / suffix).write_text("old")
        (tmp_path / f"out_text_document.{suffix}").symlink_to(tmp_path / "disk" / suffix)
    write_json_lines(tmp_path / "in.json", ["the model"])
    preprocess([tmp_path / "in.json"], tmp_path / "out", tokenizers_directory / "digits")
    assert all((tmp_path / f"out_text_document.{suffix}").is_symlink() for suffix in ("bin", "idx"))
    assert len(IndexedDataset(str(tmp_path / "out_text_document"))) == 1


def test_an_output_that_cannot_be_written_ends_with_one_line(tokenizers_directory, tmp_path, capsys):
    write_json_lines(tmp_path / "in.json", ["the model"])
    arguments = ["--tokenizer", str(tokenizers_directory / "digits"), "--input", str(tmp_path / "in.json")]
    assert main(["preprocess", *arguments, "--output-prefix", str(tmp_path / "in.json" / "out")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("maskllm preprocess: error: ") and str(tmp_path / "in.json") in last


def test_no_end_of_sequence_token_to_append(tokenizers_directory, tmp_path):
    write_json_lines(tmp_path / "in.json", ["the model"])
    tokenizer = tmp_path / "tokenizer.json"  # this file alone does not name the token
    tokenizer.write_bytes((tokenizers_directory / "digits" / "tokenizer.json").read_bytes())
    with pytest.raises(MaskLLMError, match="names no end-of-sequence token"):
        preprocess([tmp_path / "in.json"], tmp_path / "out", tokenizer, append_eod=True)
    assert preprocess([tmp_path / "in.json"], tmp_path / "out", tokenizer).documents == 1


def test_the_own_library_starts_over_when_gigatoken_is_found_inexact(
    tokenizers_directory, corpus, reference, tmp_path, monkeypatch
):
    compare = GigatokenTokenizer._compare
    calls = []

    def wrong_at_the_fifth(self, texts):
        calls.append(texts)
        if len(calls) == 5:
            raise InexactError
        compare(self, texts)

    monkeypatch.setattr(GigatokenTokenizer, "_compare", wrong_at_the_fifth)
    monkeypatch.setattr(module, "CHUNK_BYTES", 3000)
    source = write_json_lines(tmp_path / "in.json", corpus)
    assert preprocess([source], tmp_path / "out", tokenizers_directory / "gigatoken", workers=2).library == "tokenizers"
    assert files(tmp_path / "out_text_document") == megatron_files(reference("gigatoken"), tmp_path / "expected", False)
    assert len(calls) >= 5


def preprocess_until_killed(source: Path, output: Path, tokenizer: Path) -> None:
    """Preprocess in chunks of 3000 bytes; SIGKILL comes when the third one has been written."""
    module.CHUNK_BYTES = 3000
    write, chunks = module._write, []

    def killing(builder, batch) -> None:
        write(builder, batch)
        builder.data_file.flush()
        chunks.append(batch)
        if len(chunks) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    module._write = killing
    preprocess([source], output, tokenizer, workers=1)


def test_a_killed_run_leaves_no_dataset_and_the_next_run_is_complete(tokenizers_directory, corpus, reference, tmp_path):
    source = write_json_lines(tmp_path / "in.json", corpus)
    path = tokenizers_directory / "digits"
    process = multiprocessing.get_context("fork").Process(target=preprocess_until_killed, args=(source, tmp_path / "out", path))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / ".out_text_document.bin.tmp").stat().st_size > 0, "killed before it had written anything"
    assert not list(tmp_path.glob("out*"))
    preprocess([source], tmp_path / "out", path, workers=2)
    assert files(tmp_path / "out_text_document") == megatron_files(reference("digits"), tmp_path / "expected", False)
    assert not list(tmp_path.glob(".*"))
