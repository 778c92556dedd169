"""test_megatron runs this in a process of its own: a `maskllm` command that is killed while it writes the second pruned layer.

usage: python -m tests.pruning.killed_worker COMMAND LINE OF maskllm
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from maskllm.cli import main
from maskllm.pruning import store

save_file = store.save_file


def save_and_kill(tensors: dict[str, Any], path: Path, **options: Any) -> None:
    """Write a file. The process dies after the file of layer 1, which has its temporary name then."""
    save_file(tensors, path, **options)
    if "layer_00001" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    store.save_file = save_and_kill
    sys.exit(main(sys.argv[1:]))
