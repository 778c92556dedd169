"""What goes from a checkpoint directory: older iterations, and what killed jobs left."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskllm.checkpoints.checksums import MANIFEST
from maskllm.checkpoints.removing import remove_leftovers, remove_older_iterations


@pytest.fixture
def run(tmp_path) -> Path:
    """Iterations 4 (incomplete), 6, 8, 10 and 12, and "release"."""
    for name in ("iter_0000004", "iter_0000006", "iter_0000008", "iter_0000010", "iter_0000012", "release"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
        if name != "iter_0000004":
            (tmp_path / name / MANIFEST).touch()
    return tmp_path


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_the_newest_complete_iterations_stay(run):
    before = names(run)
    remove_older_iterations(run, newest=10, keep=2, protected=None)  # 12 is left of an earlier run that went further
    assert names(run) == [name for name in before if name != "iter_0000006"]
    remove_older_iterations(run, newest=12, keep=1, protected=run / "iter_0000008")
    assert names(run) == ["iter_0000004", "iter_0000008", "iter_0000012", "release"]


def test_what_killed_jobs_left_is_removed_and_the_only_copy_comes_back(run):
    before = names(run)
    for name in (".iter_0000012.old", ".iter_0000014.0123abcd.tmp", ".iter_0000002.removed"):
        (run / name).mkdir()
        (run / name / "weights").write_text("leftover")
    (run / "iter_0000010").rename(run / ".iter_0000010.old")  # a job that was to replace it was killed between two renames
    remove_leftovers(run)
    assert names(run) == before
    assert all((run / name / "weights").read_text() == name for name in before)
