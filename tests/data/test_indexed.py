"""A damaged index is refused when the dataset is opened, and nothing else is."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from maskllm.cli import main
from maskllm.data.indexed import open_indexed
from maskllm.errors import MaskLLMError
from maskllm.pruning.calibration import open_documents
from tests.conftest import LFS_POINTER

HEADER = 34
"""Bytes before the lengths."""
LENGTHS = [5, 1, 7, 3, 9, 2, 4]
DOCUMENTS = [0, 1, 1, 3, 6, 7]
"""First sequences of five documents, one of them empty, and the number of sequences."""


def write(prefix: Path, *, dtype: type = np.uint16, lengths: list[int] = LENGTHS, documents: list[int] = DOCUMENTS) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for number, length in enumerate(lengths):
        builder.add_item(torch.arange(length) + 30 * number)
    builder.document_indices = documents
    builder.finalize(f"{prefix}.idx")


def sequences(dataset: IndexedDataset) -> list[list[int]]:
    return [sequence.tolist() for sequence in dataset]


def patched(index: bytes, place: int, kind: str, value: int) -> bytes:
    return index[:place] + struct.pack(kind, value) + index[place + struct.calcsize(kind) :]


OFFSETS = HEADER + 4 * len(LENGTHS)
FIRSTS = OFFSETS + 8 * len(LENGTHS)
DAMAGED = {
    "negative": (lambda x: patched(x, HEADER + 4 * 2, "<i", -5), r"idx: sequence 2 has a length of -5, wanted 0 or more"),
    "huge": (lambda x: patched(x, HEADER + 4 * 2, "<i", 2**31 - 1), "idx: sequence 3 begins at byte 26, wanted 4294967306"),
    "huge at the end": (lambda x: patched(x, HEADER + 4 * 6, "<i", 2**31 - 1), "bin has 62 bytes, its .idx asks for 4294967348"),
    "pointers": (
        lambda x: x[:OFFSETS] + (np.frombuffer(x, np.int64, 7, OFFSETS) + 2).tobytes() + x[FIRSTS:],
        "idx: sequence 0 begins at byte 2, wanted 0",
    ),
    "first document": (lambda x: patched(x, FIRSTS, "<q", 1), "idx: the documents are sequences 1 to 7, wanted 0 to 7"),
    "last document": (lambda x: patched(x, FIRSTS + 8 * 5, "<q", 6), "idx: the documents are sequences 0 to 6, wanted 0 to 7"),
    "documents": (lambda x: patched(x, FIRSTS + 8 * 3, "<q", 0), "document 3 begins at sequence 0, wanted 1 or more"),
    "float tokens": (lambda x: patched(x, 17, "<B", 7), "is not an indexed dataset's index"),
    "wider tokens": (lambda x: patched(x, 17, "<B", 4), "idx: sequence 1 begins at byte 10, wanted 20"),
    "cut": (lambda x: x[:-1], r"idx has \d+ bytes, wanted \d+ for 7 sequences"),
    "longer": (lambda x: x + b"\0", r"idx has \d+ bytes, wanted \d+ for 7 sequences"),
    "pointer": (lambda x: LFS_POINTER.encode(), "idx: is a git-lfs pointer, .* `git lfs pull`"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_index_is_named(tmp_path, case):
    write(tmp_path / "data")
    damage, message = DAMAGED[case]
    index = tmp_path / "data.idx"
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(MaskLLMError, match=message):
        open_indexed(tmp_path / "data")


@pytest.mark.parametrize("size", [60, 64])
def test_the_index_and_the_tokens_must_fit(tmp_path, size):
    write(tmp_path / "data")
    (tmp_path / "data.bin").write_bytes(bytes(size))
    with pytest.raises(MaskLLMError, match=rf"data\.bin has {size} bytes, its \.idx asks for 62"):
        open_indexed(tmp_path / "data")


@pytest.mark.parametrize("at_once", [1, 2, 1 << 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_what_megatron_writes_is_read(tmp_path, monkeypatch, dtype, at_once):
    monkeypatch.setattr("maskllm.data.indexed._AT_ONCE", at_once)
    # Documents and sequences without tokens harm nothing.
    write(tmp_path / "data", dtype=dtype, lengths=[*LENGTHS, 0, 0], documents=[0, 2, 2, 9])
    upstream = sequences(IndexedDataset(str(tmp_path / "data")))
    assert sequences(open_indexed(tmp_path / "data")) == upstream
    with (tmp_path / "data.idx").open("ab") as index:  # modes, as multimodal datasets have
        index.write(bytes(9))
    assert sequences(open_indexed(tmp_path / "data")) == upstream


@pytest.mark.parametrize("at_once", [2, 3])
@pytest.mark.parametrize("case", ["negative", "huge", "pointers", "documents"])
def test_damage_is_found_at_any_place_of_a_long_index(tmp_path, monkeypatch, case, at_once):
    monkeypatch.setattr("maskllm.data.indexed._AT_ONCE", at_once)
    test_a_damaged_index_is_named(tmp_path, case)


def mutated(index: bytes, generator: random.Random) -> bytes:
    """The index after one to three accidents: a flipped bit, another byte, a cut, lost or inserted bytes, another number."""
    data = bytearray(index)
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(data))
        match generator.randrange(6):
            case 0:
                data[place] ^= 1 << generator.randrange(8)
            case 1:
                data[place] = generator.randrange(256)
            case 2:
                del data[max(place, 1) :]
            case 3:
                del data[place : place + generator.choice([1, 4, 8])]
                data = data or bytearray(b"\0")
            case 4:
                data[place:place] = generator.randbytes(generator.choice([1, 4, 8]))
            case 5:
                kind = generator.choice(["<i", "<q"])
                value = generator.choice([-5, -1, 0, 1, 7, 8, 2**31 - 1, generator.randrange(-(2**31), 2**31)])
                data[place : place + struct.calcsize(kind)] = struct.pack(kind, value)
    return bytes(data)


def test_no_mutation_of_an_index_changes_what_is_read(tmp_path):
    write(tmp_path / "data")
    index = (tmp_path / "data.idx").read_bytes()
    wanted = sequences(open_indexed(tmp_path / "data"))
    generator = random.Random(14)
    refused = 0
    for number in range(1000):
        (tmp_path / "data.idx").write_bytes(mutated(index, generator))
        try:
            dataset = open_indexed(tmp_path / "data")
        except MaskLLMError as error:
            assert str(tmp_path / "data") in str(error)
            refused += 1
            continue
        assert sequences(dataset) == wanted, number
        # Only the boundaries inside of the documents may have moved, which no number in the files contradicts.
        assert np.array_equal(np.concatenate(open_documents(tmp_path / "data", tmp_path)), np.concatenate(wanted)), number
    assert refused > 950


def test_prune_refuses_a_damaged_index(tmp_path, capsys, tiny_dense):
    write(tmp_path / "data")
    damage, message = DAMAGED["negative"]
    (tmp_path / "data.idx").write_bytes(damage((tmp_path / "data.idx").read_bytes()))
    arguments = ["--load", str(tiny_dense), "--output", str(tmp_path / "out"), "--method", "wanda", "--seq-length", "4"]
    assert main(["prune", *arguments, "--calibration-data", str(tmp_path / "data")]) == 1
    assert message.removeprefix("idx: ") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_long_index_is_checked_in_little_time(tmp_path):
    count = 2_000_000
    (tmp_path / "data.bin").write_bytes(bytes(2 * count))
    lengths, offsets, documents = np.ones(count, np.int32), np.arange(0, 2 * count, 2), np.arange(count + 1)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1)
    (tmp_path / "data.idx").write_bytes(header + b"".join(part.tobytes() for part in (lengths, offsets, documents)))
    started = time.process_time()
    open_indexed(tmp_path / "data")
    assert time.process_time() - started < 2  # some 0.03 s here; a loop in Python takes longer than the limit
