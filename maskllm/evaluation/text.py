"""Reads held-out text for perplexity as one string."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from maskllm.data.json_lines import document
from maskllm.data.text_files import Line, check_inputs, every_line, read_lines
from maskllm.errors import MaskLLMError

_JSON = re.compile(rb'\s*(\{\s*("|\}|$)|\[\s*("|\{|$))')
"""The start of a JSON line that is an object, or an array of objects or strings."""


FORMATS = ("auto", "c4", "c4-new", "ptb")
"""How a held-out text may be read and cut into windows; `maskllm.evaluation.windows` says what "c4" means."""

C4_NEW_DOCUMENTS = 1100


@dataclass(frozen=True)
class EvaluationText:
    """A held-out text."""

    text: str
    kind: str
    """How the file was read: "json lines", "wikitext rows", "text", "ptb rows" or "c4-new"."""


def read_evaluation_text(path: str | os.PathLike, data_format: str = "auto") -> EvaluationText:
    """Read a held-out text, plain, gzip or Zstandard.

    With the format "auto" the contents decide the kind, not the file's name:

    * JSON lines, if the first line that is not blank begins like JSON: the `text` of every line, joined by blank lines ("\\n\\n").
      JSON of another form is refused with its line number, so no model is evaluated on JSON syntax.
    * WikiText's raw form, if every line begins and ends with a space: its rows joined by "\\n\\n", as the pruning papers' loaders
      join `load_dataset("wikitext", "wikitext-2-raw-v1")["text"]`. A line of one space is an empty row. Every other row keeps its
      line end. With the Llama-2 tokenizer and BOS, the test split has 341469 tokens.
    * Any other file: its contents (UTF-8, with line ends converted to "\\n").

    The other formats are those of the pruning papers' scripts:

    * "ptb": the rows of the Penn Treebank's raw text, without white space at their ends, joined by spaces.
    * "c4-new": the `text` of the first C4_NEW_DOCUMENTS JSON lines, joined by spaces.

    Raises MaskLLMError if the file cannot be read, is not text, is empty, is JSON without a `text` in every line, or has another
    format.
    """
    (path,) = check_inputs([path])
    first = next(read_lines([path]), None)
    is_json = first is not None and _JSON.match(first.data) is not None
    if data_format == "c4-new":
        found = EvaluationText(" ".join(_documents(itertools.islice(read_lines([path]), C4_NEW_DOCUMENTS))), "c4-new")
    elif data_format == "ptb":
        if is_json:
            raise MaskLLMError(f"{path}:{first.number}: is JSON; --data-format ptb wants the rows of the Penn Treebank's raw text")
        found = EvaluationText(" ".join(row.strip() for row in _decoded(path).split("\n") if row.strip()), "ptb rows")
    elif is_json:
        found = EvaluationText("\n\n".join(_documents(read_lines([path]))), "json lines")
    else:
        found = _plain(path)
    if not found.text.strip():
        raise MaskLLMError(f"{path}: no text to evaluate on")
    return found


def read_documents(path: str | os.PathLike) -> list[str]:
    """The `text` of every line of a file with JSON lines. Raises MaskLLMError if it has none, or as `read_evaluation_text` does."""
    (path,) = check_inputs([path])
    documents = list(_documents(read_lines([path])))
    if not documents:
        raise MaskLLMError(f"{path}: no text to evaluate on")
    return documents


def _documents(lines: Iterable[Line]) -> Iterable[str]:
    return (document(line, "text") for line in lines)


def _decoded(path: Path) -> str:
    try:
        return b"".join(line.data for line in every_line(path)).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise MaskLLMError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from error


def _plain(path: Path) -> EvaluationText:
    text = _decoded(path)
    lines = text.split("\n")
    if lines[-1] == "":
        del lines[-1]
    if lines and all(line.startswith(" ") and line.endswith(" ") for line in lines):
        return EvaluationText("\n\n".join("" if line == " " else line + "\n" for line in lines), "wikitext rows")
    return EvaluationText(text, "text")
