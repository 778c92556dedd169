"""What is removed from a checkpoint directory: iterations beyond `--keep-last`, and what killed jobs left unfinished."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from maskllm.checkpoints.finding import is_complete, iteration_number


def remove_older_iterations(root: Path, newest: int, keep: int, protected: Path | None) -> None:
    """Keep the complete iteration `newest` and the `keep` - 1 complete ones before it. Remove the older ones, except `protected`.

    "release", incomplete iterations and iterations newer than `newest` stay.
    """
    numbered = {number: entry for entry in root.iterdir() if (number := iteration_number(entry)) is not None}
    complete = {number: entry for number, entry in numbered.items() if number <= newest and is_complete(entry)}
    for number in sorted(complete, reverse=True)[keep:]:
        if protected is None or complete[number].resolve() != protected.resolve():
            removed = complete[number].with_name(f".{complete[number].name}.removed")
            os.replace(complete[number], removed)  # in one step, so that a half removed directory never passes for a checkpoint
            shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Remove what killed jobs left half written or half removed in `root`. No other job may be writing there."""
    for entry in root.glob(".iter_*.tmp"):
        shutil.rmtree(entry, ignore_errors=True)
    for entry in root.glob(".iter_*.removed"):
        shutil.rmtree(entry, ignore_errors=True)
    for entry in root.glob(".iter_*.old"):  # `publish_directory` moved it aside; the job may have died before the new one came
        path = root / entry.name.removeprefix(".").removesuffix(".old")
        if path.exists():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            os.replace(entry, path)
