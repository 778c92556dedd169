"""JSON lines, as in C4: each line is an object with the text of a document under one key."""

from __future__ import annotations

import json

from maskllm.data.text_files import Line
from maskllm.errors import MaskLLMError


class BadLineError(MaskLLMError):
    """A line that holds no document. The message names the file, the line and the reason."""


def document(line: Line, key: str) -> str:
    """The text of a line. Raises BadLineError if the line is not a JSON object with a string of valid Unicode under `key`."""

    def bad(reason: str) -> BadLineError:
        return BadLineError(f"{line.path}:{line.number}: {reason}")

    try:
        value = json.loads(line.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise bad(f"not UTF-8: byte 0x{line.data[error.start]:02x} at offset {error.start}") from error
    except (ValueError, RecursionError) as error:  # numbers with thousands of digits raise a plain ValueError
        raise bad(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise bad(f"a JSON {_kind(value)}, wanted an object with the key {key!r}")
    if key not in value:
        raise bad(f"no key {key!r} (it has {', '.join(map(repr, list(value)[:8])) or 'none'})")
    text = value[key]
    if not isinstance(text, str):
        raise bad(f"{key!r} is a JSON {_kind(text)}, wanted a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise bad(f"{key!r} holds half of a surrogate pair, \\u{ord(text[error.start]):04x}") from error
    return text


def _kind(value: object) -> str:
    """JSON's name for the type of `value`."""
    return {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
