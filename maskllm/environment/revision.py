"""Which code runs."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from maskllm import __version__

_DOCUMENTATION = (":(exclude)docs", ":(exclude)*.md")


def commit() -> str | None:
    """The commit of the checkout that the package runs from, with "-dirty" after local changes to more than its documentation.

    None outside of a checkout.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=60, check=True)
        changes = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", *_DOCUMENTATION], timeout=60, check=False).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() + ("-dirty" if changes else "")


def running_code(packages: Sequence[str]) -> dict[str, str | None]:
    """The versions of maskllm and of these packages, and `commit`. Call it before the hours in which the checkout may change."""
    return {"maskllm": __version__, "commit": commit(), **{name: metadata.version(name) for name in packages}}
