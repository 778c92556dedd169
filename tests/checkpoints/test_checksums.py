"""`manifest.json`: it holds every file's size and checksum, and each missing or damaged file is named."""

from __future__ import annotations

import binascii

import pytest

from maskllm.checkpoints.checksums import MANIFEST, FileRecord, Manifest
from maskllm.checkpoints.info import INFO
from maskllm.errors import MaskLLMError

from .conftest import flip_a_bit, read_everything


def test_the_manifest_holds_every_files_size_and_checksum(llama3_dense):
    directory = llama3_dense / "release"
    found = Manifest.read(directory).files
    expected = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    del expected[MANIFEST]
    assert found == {name: FileRecord(len(data), f"{binascii.crc32(data):08x}") for name, data in expected.items()}


@pytest.mark.parametrize("name", [INFO, ".metadata", "metadata.json", "common.pt", "__0_0.distcp", "hf/config.json"])
def test_a_missing_file_is_named(dense, name):
    (dense / "release" / name).unlink()
    with pytest.raises(MaskLLMError) as caught:
        read_everything(dense)
    assert str(caught.value).startswith(f"{dense / 'release' / name}: no such file, though manifest.json lists it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [".metadata", "hf/config.json", "__0_0.distcp"])
def test_a_file_with_a_flipped_bit_is_named(dense, name):
    wanted = Manifest.read(dense / "release").files[name].crc32
    flip_a_bit(dense / "release" / name)
    found = FileRecord.of(dense / "release" / name).crc32
    with pytest.raises(MaskLLMError) as caught:
        read_everything(dense)
    assert str(caught.value).startswith(f"{dense / 'release' / name}: found checksum {found}, wanted {wanted};")


@pytest.mark.parametrize("name", [INFO, "__0_0.distcp"])
def test_a_file_of_another_size_is_named(dense, name):
    (dense / "release" / name).write_bytes(b"{")
    with pytest.raises(MaskLLMError, match="found 1 bytes, wanted") as caught:
        read_everything(dense)
    assert str(caught.value).startswith(str(dense / "release" / name))


@pytest.mark.parametrize(
    ("text", "words"), [("{}", "manifest.json: format_version is None, wanted 1"), ("", "manifest.json: line 1: not JSON")]
)
def test_a_damaged_manifest_is_named(dense, text, words):
    (dense / "release" / MANIFEST).write_text(text)
    with pytest.raises(MaskLLMError) as caught:
        read_everything(dense)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
