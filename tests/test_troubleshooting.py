"""docs/troubleshooting.md lists messages in the words in which the program says them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALL_MODULES = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "maskllm").rglob("*.py"))]


def listed_messages() -> list[str]:
    """What stands in the tables' first columns, but for torchrun's own messages."""
    ours, _, _ = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## What torchrun adds")
    cells = [line.split(" | ")[0] for line in ours.splitlines() if line.startswith("| `")]
    return [message for cell in cells for message in re.findall("`([^`]*)`", cell)]


def texts() -> Iterator[str]:
    """Every string of the program; in place of what is filled in stands a constant's value, or a line's end."""
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
def said() -> str:
    return "\n".join(texts()).replace("`", "")


@pytest.mark.parametrize("message", listed_messages())
def test_a_listed_message_is_one_of_the_programs(message, said):
    # A message may be put together of several strings, at these marks.
    pieces = [piece.strip() for piece in re.split(r"\.\.\.|[:;,()]", message)]
    assert [piece for piece in pieces if " " in piece and piece not in said] == []
