"""Which iteration of a checkpoint directory is used: the one that is named, or the newest complete one."""

from __future__ import annotations

import os
import shutil

import pytest

from maskllm.checkpoints.checksums import MANIFEST
from maskllm.checkpoints.finding import LATEST, iterations
from maskllm.checkpoints.reading import open_iteration, resolve
from maskllm.errors import MaskLLMError


def test_the_root_and_the_iteration_are_the_same_checkpoint(dense):
    assert resolve(dense).path == resolve(dense / "release").path == dense / "release"
    assert (dense / LATEST).read_text() == "release\n"
    assert resolve(dense).iteration == "release"


def test_the_latest_iteration_is_the_one_that_is_named(dense):
    for number in (8, 12, 16):
        shutil.copytree(dense / "release", dense / f"iter_{number:07d}")
    (dense / LATEST).write_text("12")
    assert resolve(dense).path == dense / "iter_0000012"
    assert resolve(dense).iteration == 12
    lines = []
    assert [path.name for path in iterations(dense, say=lines.append)] == ["iter_0000012", "iter_0000008"]
    assert lines == [f"{dense / 'iter_0000016'}: newer than iter_0000012, which {LATEST} names; ignored"]


def test_the_newest_complete_iteration_is_found_without_being_named(dense):
    for number in (8, 12, 16):
        shutil.copytree(dense / "release", dense / f"iter_{number:07d}")
    (dense / LATEST).unlink()
    assert resolve(dense).iteration == 16
    (dense / "iter_0000016" / MANIFEST).unlink()  # it is written last
    lines = []
    assert open_iteration(iterations(dense, say=lines.append)[0]).iteration == 12
    assert lines == [f"{dense / 'iter_0000016'}: not complete, it has no {MANIFEST}; ignored"]
    (dense / LATEST).write_text("16")
    lines.clear()
    assert open_iteration(iterations(dense, say=lines.append)[0]).iteration == 12
    assert (
        lines[-1] == f"{dense / 'iter_0000016'}: not complete, it has no {MANIFEST}, though {LATEST} names it; using iter_0000012"
    )


def test_the_newest_is_used_if_its_save_was_killed_before_it_was_named(dense):
    for number in (8, 12, 16):
        shutil.copytree(dense / "release", dense / f"iter_{number:07d}")
    (dense / LATEST).write_text("12\n")
    os.utime(dense / LATEST, ns=(0, (dense / "iter_0000016" / MANIFEST).stat().st_mtime_ns - 1))
    lines = []
    assert [path.name for path in iterations(dense, say=lines.append)] == ["iter_0000016", "iter_0000012", "iter_0000008"]
    assert lines == [f"{dense / 'iter_0000016'}: complete, and newer than {LATEST}, which names iter_0000012; using iter_0000016"]
    (dense / LATEST).write_text("8\n")  # a user names an older one later
    assert resolve(dense).iteration == 8


def test_a_name_that_is_no_iteration_is_ignored_only_on_request(dense):
    shutil.copytree(dense / "release", dense / "iter_0000008")
    (dense / LATEST).write_text("v\n")
    with pytest.raises(MaskLLMError, match="holds 'v'"):
        iterations(dense)
    lines = []
    assert iterations(dense, fall_back=True, say=lines.append) == [dense / "iter_0000008"]
    assert lines == [f"{dense / LATEST}: holds 'v'; wanted 'release' or an iteration number; --auto-fallback: ignored"]


@pytest.mark.parametrize(
    ("latest", "words"), [(b"", "is empty or not text; ignored"), (b"\0\0\0", "is empty or no"), (b"3", "iter_0000003: no such")]
)
def test_a_file_that_names_nothing_usable_does_not_hide_complete_iterations(dense, latest, words):
    (dense / LATEST).write_bytes(latest)
    lines = []
    assert open_iteration(iterations(dense, say=lines.append)[0]).iteration == "release"
    assert words in lines[0]
    shutil.copytree(dense / "release", dense / "iter_0000008")
    assert resolve(dense).iteration == 8
    shutil.rmtree(dense / "iter_0000008")
    shutil.rmtree(dense / "release")
    with pytest.raises(MaskLLMError, match="no complete iteration" if latest != b"3" else "there is no other to use"):
        resolve(dense)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(MaskLLMError, match="no such directory"):
        resolve(tmp_path / "nothing")
    with pytest.raises(MaskLLMError, match="not a checkpoint"):
        resolve(tmp_path)
