"""Calibration windows: where they come from, and their order."""

import gzip
import json

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from maskllm.data.text_files import zstd
from maskllm.errors import MaskLLMError
from maskllm.pruning.calibration import IndexedDocuments, open_documents, sample_windows


def documents(lengths):
    """Document d holds the tokens 1000 d, 1000 d + 1, ..., so a window shows its document and place."""
    return [1000 * d + np.arange(length) for d, length in enumerate(lengths)]


def write_indexed(prefix, docs):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for doc in docs:
        builder.add_item(torch.from_numpy(doc))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_windows_lie_within_documents_longer_than_the_window():
    windows = sample_windows(documents([40, 8, 9, 100, 3]), 60, 8, seed=1)
    assert windows.shape == (60, 8) and windows.dtype == torch.int64
    assert (windows.diff(dim=1) == 1).all()
    sources = windows[:, 0] // 1000
    assert sources.unique().tolist() == [0, 2, 3]
    assert sources.bincount().max() - sources.bincount()[[0, 2, 3]].min() <= 1  # no document comes twice before all have come once
    assert windows[sources == 3, 0].unique().numel() > 10  # starts differ
    assert (windows[sources == 2, 0] == 2000).all()


def test_the_seed_selects_the_windows():
    docs = documents([40, 50, 60])
    first = sample_windows(docs, 5, 8, seed=1)
    assert torch.equal(first, sample_windows(docs, 5, 8, seed=1))
    assert not torch.equal(first, sample_windows(docs, 5, 8, seed=2))


def test_packing_uses_every_token_once_before_it_repeats():
    docs = documents([5, 3, 6, 2])
    windows = sample_windows(docs, 4, 4, seed=0, pack=True)
    assert sorted(windows.flatten().tolist()) == sorted(np.concatenate(docs).tolist())
    more = sample_windows(docs, 9, 4, seed=0, pack=True)
    assert torch.equal(more[:4], windows)
    starts = [stream.tolist().index(1000 * d) for d, stream in enumerate([windows.flatten()] * 4)]
    for d, (start, doc) in enumerate(zip(starts, docs, strict=True)):  # documents stay whole
        assert windows.flatten()[start : start + len(doc)].tolist() == doc.tolist(), d


def test_the_error_for_short_documents_suggests_a_remedy():
    with pytest.raises(MaskLLMError, match=r"none of the 2 .* longer than 8 .*--pack"):
        sample_windows(documents([8, 4]), 2, 8, seed=0)
    with pytest.raises(MaskLLMError, match="no tokens"):
        sample_windows(documents([0, 0]), 2, 8, seed=0, pack=True)
    assert len(sample_windows(documents([3, 4]), 2, 8, seed=0, pack=True)) == 2


def write_tokenizer(folder):
    """A tokenizer that maps the word "n" to the token n, and "." to the end of a document."""
    vocabulary = {str(n): n for n in range(100)} | {".": 100}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".").save_pretrained(folder)
    return folder


def test_an_indexed_dataset_and_json_lines_give_the_same_documents(tmp_path):
    docs = [np.array([5, 6, 7, 8]), np.array([9]), np.arange(30)]
    write_indexed(tmp_path / "data", docs)
    lines = "".join(json.dumps({"text": " ".join(map(str, doc)), "url": "x"}) + "\n" for doc in docs).encode()
    (tmp_path / "data.json").write_bytes(lines)
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(lines))
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data.json.zst").write_bytes(zstd.compress(lines))
    for name in ("data", "data.json", "data.json.gz", "data.json.zst"):
        found = open_documents(tmp_path / name, tokenizer)
        assert [doc.tolist() for doc in found] == [doc.tolist() for doc in docs], name
        assert all(doc.dtype == np.int64 for doc in found)
    ended = open_documents(tmp_path / "data.json", tokenizer, append_eod=True)
    assert [doc.tolist() for doc in ended] == [[*doc.tolist(), 100] for doc in docs]


def test_a_document_of_several_sequences_is_one(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.int32)
    for sequence, ends in (([1, 2], False), ([3], True), ([4, 5, 6], True)):
        builder.add_item(torch.tensor(sequence))
        if ends:
            builder.end_document()
    builder.finalize(str(tmp_path / "data.idx"))
    assert [doc.tolist() for doc in IndexedDocuments(tmp_path / "data")] == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("line", ["{}", "[1]", '{"text": 5}', "not json"])
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "data.json"
    path.write_text('{"text": "1 2"}\n' + line + "\n")
    with pytest.raises(MaskLLMError, match=r"data\.json:2: "):
        list(open_documents(path, write_tokenizer(tmp_path / "tokenizer")))


def test_missing_and_damaged_data_are_named(tmp_path):
    with pytest.raises(MaskLLMError, match="nowhere: wanted an indexed dataset's prefix"):
        open_documents(tmp_path / "nowhere", tmp_path)
    for data, index, message in ((b"", b"MMIDIDX", r"bad\.bin is empty"), (b"1234", b"MMIDIDX", r"bad\.idx is not an indexed")):
        (tmp_path / "bad.bin").write_bytes(data)
        (tmp_path / "bad.idx").write_bytes(index)
        with pytest.raises(MaskLLMError, match=message):
            open_documents(tmp_path / "bad", tmp_path)
    (tmp_path / "data.json").write_text('{"text": "1"}\n')
    with pytest.raises(MaskLLMError, match="tokenizer"):
        open_documents(tmp_path / "data.json", tmp_path)
