"""What is not text is refused before anything is read of it, and told by its contents."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest

from maskllm.data.text_files import check_inputs, every_line, zstd
from maskllm.errors import MaskLLMError
from tests.conftest import LFS_POINTER

LINES = b"".join(b'{"text": "line %d"}\n' % number for number in range(200))


def archive(kind: str) -> bytes:
    """A zip or tar archive of one file."""
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w") as file:
            file.writestr("data.json", LINES)
    else:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT if kind == "gnu" else tarfile.PAX_FORMAT) as file:
            member = tarfile.TarInfo("data.json")
            member.size = len(LINES)
            file.addfile(member, io.BytesIO(LINES))
    return stream.getvalue()


OTHER = {
    "bzip2": (bz2.compress(LINES), "is a bzip2 file; .*bunzip2"),
    "xz": (lzma.compress(LINES), "is an xz file; .*unxz"),
    "lz4": (b"\x04\x22\x4d\x18\x64\x40\xa7", "is an lz4 file; .*unlz4"),
    "zip": (archive("zip"), "is a zip archive; .*unzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "is a 7z archive; .*7z x"),
    "tar": (archive("pax"), "is a tar archive; .*tar -xf"),
    "tar.gz": (gzip.compress(archive("gnu")), "is a tar archive; .*tar -xf"),
    "tar.zst": (zstd.compress(archive("gnu")), "is a tar archive; .*tar -xf"),
    "parquet": (b"PAR1\x15\x04\x15\x10", r"is a Parquet file; .*load_dataset\('parquet'"),
    "arrow": (b"ARROW1\0\0\xff\xff\xff\xff", r"is an Arrow file; .*load_dataset\('arrow'"),
    "arrow stream": (b"\xff\xff\xff\xff\x98\x02\0\0", r"is an Arrow stream; .*load_dataset\('arrow'"),
    "utf-16": (LINES.decode().encode("utf-16"), "is UTF-16 text; .*iconv"),
    "twice": (gzip.compress(gzip.compress(LINES)), "is compressed twice"),
    "twice, zst": (zstd.compress(zstd.compress(LINES)), "is compressed twice"),
    "pointer": (LFS_POINTER.encode(), "is a git-lfs pointer, .*`git lfs pull`"),
}


@pytest.mark.parametrize("form", OTHER)
def test_a_file_of_another_form_is_told_by_its_contents(tmp_path, form):
    contents, message = OTHER[form]
    (tmp_path / "data.json").write_bytes(contents)
    with pytest.raises(MaskLLMError, match=f"data.json: {message}"):
        check_inputs([tmp_path / "data.json"])


def lines(path: Path) -> list[bytes]:
    return [line.data for line in every_line(*check_inputs([path]))]


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
def test_a_compressed_file_that_ends_early_is_named(tmp_path, compress):
    whole = compress(LINES)
    path = tmp_path / "data"
    path.write_bytes(whole)
    assert b"".join(lines(path)) == LINES
    for size in (8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(MaskLLMError, match=r"data: the (gzip|Zstandard) stream is damaged or cut off after line \d+ "):
            lines(path)


def test_a_window_of_two_gigabytes_is_read(tmp_path):
    # as `zstd --ultra --long=31` writes: the header says which window the reader must keep
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    (tmp_path / "data").write_bytes(compressor.compress(LINES) + compressor.flush())
    with pytest.raises(zstd.ZstdError):
        zstd.decompress((tmp_path / "data").read_bytes())
    assert b"".join(lines(tmp_path / "data")) == LINES
