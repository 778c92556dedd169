"""The result files in docs/benchmarks/results: what was measured, when, where, by which command, and with which code."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskllm.errors import MaskLLMError
from maskllm.files import read_json_object, write_json

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "benchmarks" / "results"
PACKAGES = ("torch", "megatron-core", "transformers")


@dataclass(frozen=True)
class Result:
    """A result file. A field that nobody recorded is None."""

    result: Any
    """The numbers, as the benchmark wrote them."""
    date: str | None
    machine: str | None
    load: float | None
    """Programs that were running when the measurement began: the system's load average over one minute."""
    versions: dict[str, str | None]
    commit: str | None
    """With "-dirty" if code had local changes."""
    command: str | None
    note: str | None
    """What else to know about this result."""


def new_result(result: Any, command: str, load: float, revision: str | None) -> Result:
    """The result of a command that has just ended on this machine; load and commit are those of its start."""
    from benchmarks.machine import describe  # imports torch, which takes seconds

    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return Result(result, datetime.date.today().isoformat(), describe(), round(load, 1), versions, revision, command, None)


def result_file(name: str) -> Path:
    """The file of the measurement `name`."""
    return FOLDER / f"{name}.json"


def write_result(name: str, result: Result) -> None:
    """Write the file of a measurement."""
    result_file(name).parent.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(result)
    write_json(result_file(name), {key: values[key] for key in sorted(values, key=lambda key: key == "result")})


def read_result(name: str) -> Result | None:
    """The result of a measurement, or None if there is none. Raises MaskLLMError if its file has other keys than `Result`."""
    file = result_file(name)
    if not file.exists():
        return None
    values = read_json_object(file)
    if values.keys() != (wanted := {field.name for field in dataclasses.fields(Result)}):
        raise MaskLLMError(f"{file}: found the keys {', '.join(sorted(values))}; wanted {', '.join(sorted(wanted))}")
    return Result(**values)


def is_older(result: Result, command: str, sources: Sequence[str]) -> bool:
    """Whether another command, or other code in `sources` (paths from the repository's root), may have made the result."""
    if result.command != command or result.commit is None or result.commit.endswith("-dirty"):
        return True
    difference = ["git", "-C", str(ROOT), "diff", "--quiet", result.commit, "--", *sources]
    return subprocess.run(difference, capture_output=True, check=False).returncode != 0  # 128: git does not know the commit


def load_average() -> float:
    """Programs that wanted a processor in the last minute, in the mean."""
    return os.getloadavg()[0]
