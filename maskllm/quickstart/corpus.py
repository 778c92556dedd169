"""Training and held-out text from the documentation that every installation has.

The text is `pydoc_data.topics` and the long string literals of the standard library, torch, numpy and transformers: docstrings,
and the arguments of `add_docstr` and `add_newdoc`. They are read from the source files; no module is imported. Only prose is
kept, and repeated passages are dropped. A hash of its text puts a document into one of the two files, so the same installation
gives the same files.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from maskllm.errors import MaskLLMError
from maskllm.files import atomic_directory
from maskllm.quickstart.prose import prose_blocks

PACKAGES = ("torch", "numpy", "transformers")
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"
MIN_CHARACTERS = 300
"""Shorter string literals are not read, and shorter documents are dropped after cleaning."""
HELD_OUT_ONE_IN = 20
SHINGLE_WORDS = 6
_SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "_internal"}

# The pattern also matches comments and one-line strings, so that a quote inside them does not open a literal.
_LITERALS = re.compile(
    r'''\#[^\n]*
    |(?P<quote>"""|\'\'\')(?P<body>[^\\"']*(?:(?:\\.|(?!(?P=quote)).)[^\\"']*)*)(?P=quote)
    |"(?:\\.|[^"\\\n])*"
    |'(?:\\.|[^'\\\n])*\'''',
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True)
class CorpusSummary:
    """The files and counts that `write_documentation_corpus` returns."""

    train_file: Path
    held_out_file: Path
    train_documents: int
    held_out_documents: int
    characters: int


def write_documentation_corpus(directory: str | os.PathLike) -> CorpusSummary:
    """Write train.jsonl and held_out.jsonl to `directory`, complete or not at all.

    The format is C4's: one JSON object with the key `text` per line. One document in 20 is held out. Both files are sorted by a
    hash of the text, so every prefix of a file mixes all packages.

    Raises MaskLLMError if a package is not installed or has no readable source files.
    """
    directory = Path(directory)
    documents = sorted(deduplicated(installed_documentation()), key=_digest)
    train = [text for text in documents if _digest(text) % HELD_OUT_ONE_IN]
    held_out = [text for text in documents if not _digest(text) % HELD_OUT_ONE_IN]
    with atomic_directory(directory) as temporary:
        for name, texts in ((TRAIN_FILE, train), (HELD_OUT_FILE, held_out)):
            lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
            (temporary / name).write_text("".join(lines), encoding="utf-8")
    return CorpusSummary(directory / TRAIN_FILE, directory / HELD_OUT_FILE, len(train), len(held_out), sum(map(len, documents)))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def installed_documentation() -> Iterator[list[str]]:
    """The prose blocks of every long string literal of the installation, ordered by package, path and position.

    Raises MaskLLMError if a package is not installed or has no readable source files.
    """
    roots = [("python", Path(sysconfig.get_path("stdlib")))]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise MaskLLMError(f"the package {package} is not installed, so its documentation cannot be read")
        roots.append((package, Path(spec.origin).parent))
    files = []
    for package, root in roots:
        # Skip test data and vendored packages. Only the part below `root` counts: `root` itself may lie under site-packages.
        paths = [path for path in root.rglob("*.py") if not _SKIPPED_DIRECTORIES.intersection(path.relative_to(root).parts)]
        if not paths:
            raise MaskLLMError(f"{root}: found no source files of {package}, so its documentation cannot be read")
        files += sorted(paths)
    for path in tqdm(files, desc="documentation", unit="file", disable=None):
        try:
            source = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        for literal in long_literals(source):
            yield prose_blocks(literal)


def long_literals(source: str) -> Iterator[str]:
    """The values of the triple-quoted string literals with at least MIN_CHARACTERS characters in Python source.

    Bytes and f-strings are skipped. Reading stops at an f-string that contains its own quotes (allowed since Python 3.12): after
    it, the pattern cannot tell literals from code.
    """
    for match in _LITERALS.finditer(source):
        body = match["body"]
        if body is None or len(body) < MIN_CHARACTERS:
            continue
        prefix = re.search(r"\w*$", source[max(0, match.start() - 3) : match.start()])[0].lower()
        if prefix in ("", "r", "u"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes
                yield ast.literal_eval(prefix + match[0])
        elif prefix not in ("b", "br", "rb", "f", "fr", "rf"):
            return


def deduplicated(documents: Iterable[list[str]]) -> Iterator[str]:
    """Drop blocks that repeat earlier ones, join the rest of each document by newlines, and drop documents that become too short.

    A block is a repeat if more than half of its runs of SHINGLE_WORDS consecutive words occurred before. This also drops
    near-duplicates, such as the same sentence about another model. Runs are compared by a 32-bit hash of their lower-case words.
    """
    seen: set[int] = set()
    for blocks in documents:
        kept = []
        for block in blocks:
            words = re.findall(r"[a-z]+", block.lower())
            runs = {
                zlib.crc32(" ".join(words[start : start + SHINGLE_WORDS]).encode())
                for start in range(max(1, len(words) - SHINGLE_WORDS + 1))
            }
            if 2 * len(runs & seen) <= len(runs):
                kept.append(block)
            seen |= runs
        text = "\n".join(kept)
        if len(text) >= MIN_CHARACTERS:
            yield text
