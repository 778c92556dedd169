"""Which iteration of a checkpoint directory to use, and what its parts are called.

CKPT/latest_checkpointed_iteration.txt    "release" or a number, as Megatron-LM writes it
CKPT/release/, CKPT/iter_0000010/         one iteration each:
    *.distcp, .metadata, metadata.json, common.pt      Megatron Core's torch_dist format (`torch_dist`)
    hf/                                   config.json, tokenizer and all other files of the original but weights
    maskllm.json                          what the tensors are: stage, pattern, origin (`info`)
    manifest.json                         size and checksum of every other file (`checksums`), written last
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from maskllm.checkpoints.checksums import MANIFEST
from maskllm.checkpoints.info import INFO
from maskllm.errors import MaskLLMError

LATEST = "latest_checkpointed_iteration.txt"

Iteration = int | Literal["release"]
"""A training step, or "release" for a checkpoint that does not come from training (as Megatron-LM calls it)."""


def iteration_name(iteration: Iteration) -> str:
    """The name of an iteration's directory, as in Megatron-LM."""
    return "release" if iteration == "release" else f"iter_{iteration:07d}"


def iteration_number(directory: Path) -> int | None:
    """The number in the name of an iteration's directory; None for other names."""
    match = re.fullmatch(r"iter_(\d+)", directory.name)
    return int(match[1]) if match else None


def is_complete(directory: Path) -> bool:
    """Whether the checkpoint in `directory` was written to its end. It may have been damaged since."""
    return (directory / MANIFEST).is_file()


def what_is_missing(directory: Path) -> str:
    """The part of an error message that says why `directory` is not a complete checkpoint."""
    return f"not complete, it has no {MANIFEST}" if directory.is_dir() else "no such directory"


def holds_checkpoint(path: str | Path) -> bool:
    """Whether there is a checkpoint at `path`, or `latest_checkpointed_iteration.txt` says that there should be one."""
    path = Path(path)
    if not path.is_dir():
        return False
    return (
        (path / LATEST).is_file()
        or (path / INFO).is_file()
        or is_complete(path)
        or any(iteration_number(entry) is not None and is_complete(entry) for entry in path.iterdir())
    )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def iterations(path: str | Path, *, fall_back: bool = False, say: Callable[[str], None] = _to_stderr) -> list[Path]:
    """The iteration directories that a run can continue from, best first. An iteration directory gives itself alone.

    The best one is the one that `latest_checkpointed_iteration.txt` names; older ones follow. The newest complete one is the best
    if that file (a) is missing, (b) is not text, (c) names an incomplete checkpoint, or (d) names the second newest and is older
    than the newest, because a save was killed before it wrote the file. Incomplete directories are left out.

    `say` is called with a line about each newer directory that is not used, and about a file that is not text. Raises MaskLLMError
    if there is no complete iteration, and if that file holds anything but "release" or a number; `fall_back` treats that as (b).
    """
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such directory"
        raise MaskLLMError(f"{path}: {found}; wanted a checkpoint that `maskllm convert` or training wrote")
    if (path / INFO).is_file() or is_complete(path):
        return [path]
    latest = _named_by_latest(path, fall_back, say)
    if latest is not None and latest.name == "release":
        return [latest]
    found = sorted(((number, entry) for entry in path.iterdir() if (number := iteration_number(entry)) is not None), reverse=True)
    complete = [entry for _, entry in found if is_complete(entry)]
    if latest is not None and is_complete(latest):
        if complete[1:2] == [latest] and _time_of(complete[0] / MANIFEST) > _time_of(path / LATEST):
            say(f"{complete[0]}: complete, and newer than {LATEST}, which names {latest.name}; using {complete[0].name}")
            return complete
        for entry in complete[: complete.index(latest)]:
            say(f"{entry}: newer than {latest.name}, which {LATEST} names; ignored")
        return complete[complete.index(latest) :]
    if not complete:
        if is_complete(path / "release"):
            complete = [path / "release"]
        elif latest is not None:
            raise MaskLLMError(f"{latest}: {what_is_missing(latest)}, though {LATEST} beside it names it; there is no other to use")
        else:
            raise MaskLLMError(f"{path}: not a checkpoint, it has no complete iteration; `maskllm convert` makes one")
    for _, entry in found:
        if entry not in complete and iteration_number(entry) > (iteration_number(complete[0]) or 0):
            say(f"{entry}: {what_is_missing(entry)}; ignored")
    if latest is not None:
        say(f"{latest}: {what_is_missing(latest)}, though {LATEST} names it; using {complete[0].name}")
    return complete


def _time_of(file: Path) -> int:
    """When `file` was written, in ns since 1970."""
    return file.stat().st_mtime_ns


def _named_by_latest(root: Path, fall_back: bool, say: Callable[[str], None]) -> Path | None:
    """The iteration directory that `latest_checkpointed_iteration.txt` names; None if that file is missing or is not text.

    Raises MaskLLMError if the file holds anything but "release" or a number; with `fall_back` returns None instead.
    """
    if not (root / LATEST).is_file():
        return None
    text = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    if not text.isprintable() or not text:  # the disk lost its contents
        say(f"{root / LATEST}: is empty or not text; ignored")
        return None
    if text != "release" and not re.fullmatch(r"\d{1,18}", text):
        problem = f"{root / LATEST}: holds {text[:40]!r}; wanted 'release' or an iteration number"
        if not fall_back:
            raise MaskLLMError(problem)
        say(f"{problem}; --auto-fallback: ignored")
        return None
    return root / iteration_name("release" if text == "release" else int(text))
