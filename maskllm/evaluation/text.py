"""Reads held-out text for perplexity as one string."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from maskllm.data.json_lines import document
from maskllm.data.text_files import check_inputs, every_line, read_lines
from maskllm.errors import MaskLLMError

_JSON = re.compile(rb'\s*(\{\s*("|\}|$)|\[\s*("|\{|$))')
"""The start of a JSON line that is an object, or an array of objects or strings."""


@dataclass(frozen=True)
class EvaluationText:
    """A held-out text."""

    text: str
    kind: str
    """How the file was read: "json lines", "wikitext rows" or "text"."""


def read_evaluation_text(path: str | os.PathLike) -> EvaluationText:
    """Read a held-out text, plain, gzip or Zstandard. The contents decide the kind, not the file's name.

    * JSON lines, if the first line that is not blank begins like JSON: the `text` of every line, joined by blank lines ("\\n\\n").
      JSON of another form is refused with its line number, so no model is evaluated on JSON syntax.
    * WikiText's raw form, if every line begins and ends with a space: its rows joined by "\\n\\n", as the pruning papers' loaders
      join `load_dataset("wikitext", "wikitext-2-raw-v1")["text"]`. A line of one space is an empty row. Every other row keeps its
      line end. With the Llama-2 tokenizer and BOS, the test split has 341469 tokens.
    * Any other file: its contents (UTF-8, with line ends converted to "\\n").

    Raises MaskLLMError if the file cannot be read, is not text, is empty, or is JSON without a `text` in every line.
    """
    (path,) = check_inputs([path])
    first = next(read_lines([path]), None)
    if first is not None and _JSON.match(first.data):
        found = EvaluationText("\n\n".join(document(line, "text") for line in read_lines([path])), "json lines")
    else:
        found = _plain(path)
    if not found.text.strip():
        raise MaskLLMError(f"{path}: no text to evaluate on")
    return found


def _plain(path: Path) -> EvaluationText:
    try:
        text = b"".join(line.data for line in every_line(path)).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise MaskLLMError(f"{path}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}") from error
    lines = text.split("\n")
    if lines[-1] == "":
        del lines[-1]
    if lines and all(line.startswith(" ") and line.endswith(" ") for line in lines):
        return EvaluationText("\n\n".join("" if line == " " else line + "\n" for line in lines), "wikitext rows")
    return EvaluationText(text, "text")
