"""Each patch is still needed: the upstream text it works around is there."""

import ast
import importlib.util
from pathlib import Path

import pytest

from megatron_patches import checkpoints, cpu, recomputation


def upstream_source(upstream: str) -> str:
    """The text of a module, or of the class or function in it that "module:Class.attribute" names."""
    module, _, symbol = upstream.partition(":")
    text = Path(importlib.util.find_spec(module).origin).read_text()
    node: ast.AST = ast.parse(text)
    for part in filter(None, symbol.split(".")):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return text if isinstance(node, ast.Module) else ast.get_source_segment(text, node)


@pytest.mark.parametrize(
    "patch", cpu.PATCHES + checkpoints.PATCHES + recomputation.PATCHES, ids=lambda patch: patch.function.__name__
)
def test_upstream_still_needs_the_patch(patch):
    assert patch.needed_for in upstream_source(patch.upstream), (
        f"{patch.upstream} no longer holds {patch.needed_for!r}: remove {patch.function.__module__}.{patch.function.__name__}"
    )
