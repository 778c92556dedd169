"""Held-out text for perplexity, as one string."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from maskllm.data.json_lines import check_inputs, document, every_line, read_lines
from maskllm.errors import MaskLLMError

_JSON = re.compile(rb'\s*(\{\s*("|\}|$)|\[\s*("|\{|$))')
"""How a line of JSON begins that is an object, or an array of objects or strings."""


@dataclass(frozen=True)
class EvaluationText:
    """What a model is evaluated on."""

    text: str
    kind: str
    """How the file was read: "json lines", "wikitext rows" or "text"."""


def read_evaluation_text(path: str | os.PathLike) -> EvaluationText:
    """Read a held-out text, plain or gzip. The kind is told by the contents, not the name.

    * JSON lines, where the first line that is not blank begins as a JSON object does: the `text` of every line, joined by blank lines
      ("\\n\\n"). So JSON of another form is refused by line, and no model is ever judged on JSON syntax.
    * WikiText's raw form, a file in which every line begins and ends with a space: its rows joined by "\\n\\n", as every pruning
      paper's loader joins `load_dataset("wikitext", "wikitext-2-raw-v1")["text"]`. A line of one space is an empty row, every other
      row keeps its line end. The test split is 341469 tokens to the Llama-2 tokenizer, BOS included.
    * Any other file: as it is (UTF-8, line ends made "\\n").

    Raises MaskLLMError where the file cannot be read, is empty, or is JSON without a `text` in every line.
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
