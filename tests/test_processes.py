"""What the operating system is asked to do with a process's memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS_OF_TWENTY_TENSORS = """
import resource, sys
import torch
from maskllm.processes import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(40):
    if turn == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 26, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_kept_memory_is_used_again_without_page_faults():
    command = [sys.executable, "-c", FAULTS_OF_TWENTY_TENSORS]
    kept, returned = (
        int(subprocess.run([*command, way], check=True, capture_output=True, text=True).stdout) for way in ("keep", "return")
    )
    assert kept < returned / 2
