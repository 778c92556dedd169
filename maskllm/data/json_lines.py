"""JSON lines: each line is an object. In a corpus, as in C4, it has the text of a document under one key."""

from __future__ import annotations

import json
from typing import Any

from maskllm.data.text_files import Line
from maskllm.errors import MaskLLMError


class BadLineError(MaskLLMError):
    """A line that holds no document. The message names the file, the line and the reason."""


def document(line: Line, key: str) -> str:
    """The text of a line. Raises BadLineError if the line is not a JSON object with a string of valid Unicode under `key`."""
    value = json_object(line, f"with the key {key!r}")
    if key not in value:
        raise _bad(line, f"no key {key!r} (it has {', '.join(map(repr, list(value)[:8])) or 'none'})")
    text = value[key]
    if not isinstance(text, str):
        raise _bad(line, f"{key!r} is a JSON {_kind(text)}, wanted a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise _bad(line, f"{key!r} holds half of a surrogate pair, \\u{ord(text[error.start]):04x}") from error
    return text


def json_object(line: Line, wanted: str = "in every line") -> dict[str, Any]:
    """The JSON object of a line. `wanted` ends the message for another value. Raises BadLineError if it is not an object."""
    try:
        value = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _bad(line, f"not UTF-8: byte 0x{line.data[error.start]:02x} at offset {error.start}") from error
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits raise a plain ValueError
        raise _bad(line, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _bad(line, f"a JSON {_kind(value)}, wanted an object {wanted}")
    return value


def _bad(line: Line, reason: str) -> BadLineError:
    return BadLineError(f"{line.path}:{line.number}: {reason}")


def _kind(value: object) -> str:
    """JSON's name for the type of `value`."""
    return {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
