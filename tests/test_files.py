"""Outputs appear complete or not at all: on a full disk, over links and other things, and after a killed run."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskllm.errors import MaskLLMError
from maskllm.files import (
    atomic_directory,
    atomic_file,
    check_not_lfs_pointer,
    empty_output,
    explain_safetensors_errors,
    read_json_object,
)
from tests.conftest import LFS_POINTER


@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
def test_a_full_disk_names_the_output_and_leaves_nothing(tmp_path, atomic):
    with pytest.raises(OSError, match="No space left") as caught, atomic(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_directory_or_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place, found in ((tmp_path, "a directory"), (tmp_path / "pipe", "not a regular file")):
        with pytest.raises(MaskLLMError, match=f"{place}: is {found}, wanted a file to write"), atomic_file(place):
            pass
    assert (tmp_path / "pipe").is_fifo()


def test_leftovers_of_a_killed_replacement_do_not_stop_the_next_one(tmp_path):
    for kept in (tmp_path / "out", tmp_path / ".out.old"):
        kept.mkdir()
        (kept / "old").touch()
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_directory_is_written_by_one_process_at_a_time(tmp_path):
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "first").touch()
        with pytest.raises(MaskLLMError, match="out: another process is writing it"), atomic_directory(tmp_path / "out"):
            pass
        assert (temporary / "first").exists()
    with pytest.raises(MaskLLMError, match="is not an empty directory"), atomic_directory(tmp_path / "out", replace=False):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "first"]


def test_an_empty_directory_keeps_its_permissions(tmp_path):
    (tmp_path / "out").mkdir(mode=0o700)
    with atomic_directory(tmp_path / "out", replace=False) as temporary:
        (temporary / "new").touch()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_a_mount_point_is_no_output(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(MaskLLMError, match="is a mount point; name a directory in it"):
        empty_output(tmp_path)


def test_a_safetensors_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "weights"
    with pytest.raises(MaskLLMError, match=r"weights: cannot be written: .*No such file"), explain_safetensors_errors(path):
        save_file({"a": torch.zeros(1)}, path)


@pytest.mark.parametrize("there", [True, False])
def test_an_output_to_a_link_is_written_to_its_target(tmp_path, there):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "file").symlink_to(Path("disk") / "file")  # relative, as people make them
    (tmp_path / "directory").symlink_to(disk / "directory")
    if there:
        (disk / "file").write_text("old")
        (disk / "directory").mkdir()
        (disk / "directory" / "old").write_text("old")
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    with atomic_directory(tmp_path / "directory") as temporary:
        (temporary / "new").write_text("new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "directory").is_symlink()
    assert {str(path.relative_to(disk)) for path in disk.rglob("*")} == {"file", "directory", "directory/new"}
    assert (disk / "file").read_text() == "new"


@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
def test_directories_made_for_a_failed_output_are_removed(tmp_path, atomic):
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "some" / "where" / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reader", [check_not_lfs_pointer, read_json_object])
def test_a_git_lfs_pointer_is_told_by_name(tmp_path, reader):
    path = tmp_path / "config.json"
    path.write_text(LFS_POINTER)
    with pytest.raises(MaskLLMError, match=r"config.json: is a git-lfs pointer, not the file itself; run `git lfs pull`"):
        reader(path)


def test_other_files_are_no_git_lfs_pointers(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("version https://example.org/\n")
    (tmp_path / "short").write_text("version https://git-lfs")
    for path in (tmp_path / "pipe", tmp_path / "text", tmp_path / "short", tmp_path, tmp_path / "missing"):
        check_not_lfs_pointer(path)


def test_a_file_that_replaces_a_private_leftover_follows_the_umask(tmp_path):
    leftover = tmp_path / ".out.tmp"
    leftover.touch(mode=0o600)
    (tmp_path / "reference").touch()
    with atomic_file(tmp_path / "out") as temporary:
        save_file({"a": torch.zeros(1)}, temporary)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "reference").stat().st_mode
