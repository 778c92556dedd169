"""The messages in docs/troubleshooting.md are those of the program, word for word."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL_MODULES = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "maskllm").rglob("*.py"))]


def listed_messages() -> list[str]:
    """The code spans in the first columns of the tables, except torchrun's own messages."""
    ours, _, _ = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## What torchrun adds")
    cells = [line.split(" | ")[0] for line in ours.splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall("`([^`]*)`", cell)]


def program_strings() -> Iterator[str]:
    """Every string literal of the program. In f-strings a constant's value, or else a line end, replaces each field."""
    constants = {
        node.targets[0].id: node.value.value
        for module in ALL_MODULES
        for node in module.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
    }
    for node in (node for module in ALL_MODULES for node in ast.walk(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value
                if isinstance(part, ast.Constant)
                else str(constants.get(part.value.id, "\n"))
                if isinstance(part.value, ast.Name)
                else "\n"
                for part in node.values
            )


@pytest.fixture(scope="module")
def program_text() -> str:
    return "\n".join(program_strings()).replace("`", "")


@pytest.mark.parametrize("message", listed_messages())
def test_a_listed_message_is_one_of_the_programs(message, program_text):
    # The program may compose a message of several strings, which meet at "..." or at punctuation.
    pieces = [piece.strip() for piece in re.split(r"\.\.\.|[:;,()]", message)]
    assert [piece for piece in pieces if " " in piece and piece not in program_text] == []
