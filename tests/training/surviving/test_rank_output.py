"""A rank's output goes to its log in --save. Only what it prints to the console on purpose goes there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import os, subprocess, sys
from maskllm.training.surviving.rank_output import rank_output

with rank_output(sys.argv[1] or None, 3) as console:
    print("a line of Python")
    print("a warning", file=sys.stderr)
    os.write(2, b"a line of a C++ library\\n")
    subprocess.run(["echo", "a line of a child"], check=True)
    print("for the console", file=console)
print("after the block")
"""
COMMAND = [sys.executable, "-c", PROGRAM]
REDIRECTED = ["a line of Python", "a line of a C++ library", "a line of a child", "a warning"]


def lines_of_log(save: Path) -> list[str]:
    return (save / "logs" / "rank_00003.log").read_text().splitlines()


def test_output_goes_to_the_ranks_log_except_for_the_console(tmp_path):
    for _ in range(2):  # a restarted job appends
        done = subprocess.run([*COMMAND, tmp_path], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("after the block\n", "for the console\n")
    log = lines_of_log(tmp_path)
    assert len(log) == 2 * 5
    assert log[0].startswith("--- rank 3, process ")
    assert sorted(log[1:5]) == REDIRECTED


def test_without_save_nothing_is_redirected(tmp_path):
    done = subprocess.run([*COMMAND, ""], capture_output=True, text=True, check=True, cwd=tmp_path)
    printed = (done.stdout + done.stderr).splitlines()
    assert sorted(printed) == sorted([*REDIRECTED, "for the console", "after the block"])
    assert not list(tmp_path.iterdir())


def test_a_closed_console_is_no_error(tmp_path):
    ours, its = os.pipe()
    os.close(ours)
    done = subprocess.run([*COMMAND, tmp_path], stdout=subprocess.PIPE, stderr=its, text=True)
    os.close(its)
    assert (done.returncode, done.stdout) == (0, "after the block\n")
    assert sorted(lines_of_log(tmp_path)[1:]) == REDIRECTED
