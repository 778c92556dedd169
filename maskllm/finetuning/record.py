"""What an output directory knows of its run: the settings, where it began, and what each stage took."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from maskllm.distributed import from_first_rank, is_first_rank, raised_together
from maskllm.environment.machine import machine
from maskllm.environment.memory import peak_memory_bytes
from maskllm.environment.revision import commit
from maskllm.errors import MaskLLMError, flag
from maskllm.files import read_json_object, write_json
from maskllm.output_lock import LOCK, output_lock

FILE = "run.json"
PACKAGES = ("torch", "transformers", "accelerate")


class RunRecord:
    """The file `run.json` of an output directory. The first process reads and writes it."""

    def __init__(self, output: Path, settings: Callable[[], dict[str, Any]], device: torch.device) -> None:
        """Begin a run, or go on with it. `settings` are those that decide the results, JSON values by option; a file is its path and what
        tells it from another one. The first process calls it.

        The first stage writes the file, so a command that is refused before it leaves nothing. The memory of the stages is that of
        `device`. Raises MaskLLMError if the directory holds another run, or anything else, or if another process is writing there.
        """
        self._file, self._device = output / FILE, device
        self._lock = contextlib.ExitStack()
        self._is_locked = False
        with raised_together():
            found = _begun(output, settings()) if is_first_rank() else None
        found = from_first_rank(found)
        if found["stages"]:
            self._take_lock()
        self.stages: dict[str, dict[str, Any]] = found["stages"]
        self.commit: str | None = found["commit"]
        """The code's when the run began, if known."""
        self.machine: dict[str, Any] = found["machine"]
        """On which the run began."""
        self._settings: dict[str, Any] = found["settings"]

    def __enter__(self) -> RunRecord:
        """No other run writes into the directory from the first stage on, or from the start if it goes on, until the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _take_lock(self) -> None:
        """Raise MaskLLMError in all processes if another run is writing into the directory."""
        if self._is_locked:
            return
        with raised_together():
            if is_first_rank():
                self._lock.enter_context(output_lock(self._file.parent, "--output"))
        self._is_locked = True

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Callable[[], None]]:
        """A block that is the stage `name`, or a part of it; its time is added to the stage's.

        Yields a function to call at a point from which a killed run goes on: it writes down the time up to now.
        """
        self._take_lock()
        if is_first_rank():
            print(f"[{name}]", file=sys.stderr, flush=True)
        stage = self.stages.setdefault(name, {"seconds": 0.0, "peak_memory_bytes": 0})
        self._save()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        before, started = stage["seconds"], time.perf_counter()

        def note() -> None:
            stage["seconds"] = before + time.perf_counter() - started
            stage["peak_memory_bytes"] = max(stage["peak_memory_bytes"], peak_memory_bytes(self._device))
            self._save()

        try:
            yield note
        finally:
            note()

    def _save(self) -> None:
        if is_first_rank():
            begun = {"settings": self._settings, "commit": self.commit, "machine": self.machine}
            write_json(self._file, begun | {"stages": self.stages})


def _begun(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a directory's run with these settings, or a new one. Raises MaskLLMError if its run has others."""
    settings = json.loads(json.dumps(settings))  # as they are read back
    found = _read(output)
    if found is None:
        return {"settings": settings, "commit": commit(), "machine": machine(PACKAGES), "stages": {}}
    if changed := [name for name in settings if found["settings"].get(name) != settings[name]]:
        name = changed[0]
        theirs, ours = (setting_text(values.get(name)) for values in (found["settings"], settings))
        raise MaskLLMError(
            f"{output}: holds a run with {flag(name)} {theirs}, not {ours}; give the same options to go on with it, or another --output"
        )
    return found


def _read(output: Path) -> dict[str, Any] | None:
    """The record of a directory; None if it is missing or empty."""
    file = output / FILE
    if file.exists():
        found = read_json_object(file)
        if all(isinstance(found.get(key), dict) for key in ("settings", "machine", "stages")) and "commit" in found:
            return found
    if output.exists() and (not output.is_dir() or any(path.name != LOCK for path in output.iterdir())):
        raise MaskLLMError(f"--output {output}: exists and holds no run of maskllm finetune; remove it or name another")
    return None


def setting_text(value: Any) -> str:
    """A setting as the command line has it; of a file, which is a list too, its path and what tells it from another one."""
    if not isinstance(value, list):
        return str(value)
    return " ".join(f"{one[0]} ({one[1]})" if isinstance(one, list) else str(one) for one in value)
