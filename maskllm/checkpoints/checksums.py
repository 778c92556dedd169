"""The checksums of a checkpoint's files: `manifest.json`. It is written last, so a directory that has one is complete.

    {"format_version": 1, "files": {"__0_0.distcp": {"bytes": 4096, "crc32": "89abcdef"}, "hf/config.json": ...}}

The checksum is CRC-32. zlib computes it at well over 1 GB/s a thread, faster than the disks that hold checkpoints. It detects
flipped bits and swapped or lost blocks. It protects from accidents, not from an attacker.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from maskllm.errors import MaskLLMError
from maskllm.files import read_json_object, write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_CHUNK = 1 << 22


@dataclass(frozen=True)
class FileRecord:
    """The size and checksum of one file."""

    bytes: int
    crc32: str
    """CRC-32 (zlib.crc32) of the contents, 8 hexadecimal digits."""

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of the file `path`, which is read whole. Raises OSError if it cannot be read."""
        checksum = size = 0
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                checksum = zlib.crc32(chunk, checksum)
                size += len(chunk)
        return cls(size, f"{checksum:08x}")


@dataclass
class Manifest:
    """The files of one checkpoint directory as they were written."""

    directory: Path
    files: dict[str, FileRecord]
    """By path relative to the directory."""
    _verified: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of `directory`.

        Raises MaskLLMError if the manifest is missing or damaged, or if a file is missing or has another size.
        """
        path = directory / MANIFEST
        values = read_json_object(path)
        files = values.get("files")
        if values.get("format_version") != FORMAT_VERSION or not isinstance(files, dict):
            raise MaskLLMError(
                f"{path}: format_version is {values.get('format_version')!r}, wanted {FORMAT_VERSION} and an object 'files'; "
                "update maskllm, or make the checkpoint again"
            )
        try:
            records = {name: FileRecord(**record) for name, record in files.items()}
        except TypeError as error:
            raise MaskLLMError(f"{path}: {error}; the checkpoint is damaged, use another") from None
        for name, record in records.items():
            try:
                size = (directory / name).stat().st_size
            except FileNotFoundError:
                raise MaskLLMError(
                    f"{directory / name}: no such file, though {MANIFEST} lists it; the checkpoint is damaged, use another"
                ) from None
            if size != record.bytes:
                raise MaskLLMError(
                    f"{directory / name}: found {size} bytes, wanted {record.bytes}; the checkpoint is damaged, use another"
                )
        return cls(directory, records)

    def verify(self, names: Iterable[str], *, threads: int = 1) -> None:
        """Read the files `names` and compare their checksums. Files that this object has verified before are not read again.

        Raises MaskLLMError naming the first file that differs, what was found and what was wanted.
        """
        names = [name for name in names if name not in self._verified]
        total = sum(self.files[name].bytes for name in names)
        with (
            ThreadPoolExecutor(threads) as pool,
            tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=True if total < 1 << 28 else None) as progress,
        ):
            for name, found in zip(names, pool.map(self._read, names), strict=True):
                wanted = self.files[name]
                if found != wanted:
                    raise MaskLLMError(
                        f"{self.directory / name}: found checksum {found.crc32}, wanted {wanted.crc32}; the checkpoint is damaged, "
                        "use another"
                    )
                self._verified.add(name)
                progress.update(wanted.bytes)

    def _read(self, name: str) -> FileRecord:
        try:
            return FileRecord.of(self.directory / name)
        except OSError as error:
            raise MaskLLMError(f"{self.directory / name}: cannot be read ({error.strerror}); use another checkpoint") from None

    def assume_verified(self, names: Iterable[str]) -> None:
        """Count `names` as verified, because other processes have read them."""
        self._verified.update(names)


def write_manifest(directory: Path, known: Mapping[str, FileRecord] | None = None) -> None:
    """Write the manifest of all files below `directory`. Files without a record in `known` are read."""
    known = known or {}
    names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    unread = [name for name in names if name != MANIFEST and name not in known]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        read = dict(zip(unread, pool.map(lambda name: FileRecord.of(directory / name), unread), strict=True))
    records = {name: known.get(name) or read[name] for name in names if name != MANIFEST}
    write_json(
        directory / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "files": {name: {"bytes": record.bytes, "crc32": record.crc32} for name, record in records.items()},
        },
    )
