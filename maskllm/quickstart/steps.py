"""Run a pipeline step by step, each step in separate processes. A second run of the pipeline skips finished steps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from maskllm.errors import MaskLLMError
from maskllm.files import read_json_object, write_json
from maskllm.processes import wait_for_child

SAMPLE_SECONDS = 0.5
"""The least time between two looks at the memory. A look takes up to 0.1 seconds, and it may take 2 percent of the time."""


class Steps:
    """The steps of one output directory.

    `steps.json` in that directory records each step's settings and, for a finished step, its time and peak memory. The identity
    of a step is a hash of its settings and of the identity of the step before it. So a changed setting repeats its own step and
    all later ones, but no earlier one.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "steps.json"
        self.records: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self.records = read_json_object(self.file)
        self._identity = ""
        self.names: list[str] = []

    def run(
        self, name: str, output: Path, work: Callable[..., Any] | Sequence[object], *arguments: Any, can_resume: bool = False
    ) -> None:
        """Run a step unless it is finished: call `work(*arguments)` in a new process, or run the command `work`.

        `output` is removed first, unless the step was interrupted and can continue from it (`can_resume`). Files that the step wrote
        beside `output` stay.

        Raises MaskLLMError if the step fails, and StoppedError after SIGTERM, which the step's process receives too.
        """
        self.names.append(name)
        command = None if callable(work) else [str(part) for part in work]
        # The first word of a command is the interpreter's path, which is not a setting.
        settings = command[1:] if command else [f"{work.__module__}.{work.__qualname__}", *map(str, arguments)]
        self._identity = hashlib.sha256(json.dumps([self._identity, settings]).encode()).hexdigest()
        record = self.records.get(name, {})
        if record.get("identity") == self._identity and "seconds" in record and output.exists():
            print(f"[{name}] done before", file=sys.stderr, flush=True)
            return
        print(f"[{name}] {shlex.join(command) if command else work.__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
        interrupted = record.get("identity") == self._identity and "seconds" not in record
        if not (interrupted and can_resume):
            _remove(output)
        if not interrupted:
            record = {"identity": self._identity, "told": settings, "seconds_before": 0.0}
            self._save(name, record)  # before the work, so that the next run can continue even after SIGKILL
        started = time.perf_counter()
        with peak_memory() as peak:
            try:
                if command:
                    _run_command(name, command)
                else:
                    _run_function(name, work, arguments)
            except BaseException:
                record["seconds_before"] += time.perf_counter() - started
                self._save(name, record)
                raise
        seconds = record.pop("seconds_before") + time.perf_counter() - started
        self._save(name, record | {"seconds": seconds, "peak_memory_bytes": peak["bytes"]})

    def _save(self, name: str, record: dict[str, Any]) -> None:
        self.records[name] = record
        write_json(self.file, self.records)


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Watch the memory of this process and all its descendants. The mapping's "bytes" is the highest sum so far.

    On Linux, shared pages count once (proportional set size).
    """
    peak = {"bytes": 0}
    stop = threading.Event()

    def watch() -> None:
        while True:
            started = time.perf_counter()
            peak["bytes"] = max(peak["bytes"], _tree_memory())
            if stop.wait(max(SAMPLE_SECONDS, 50 * (time.perf_counter() - started))):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _tree_memory() -> int:
    total = 0
    current = psutil.Process()
    for process in [current, *current.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # the process has just ended
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    return total


def _run_command(name: str, command: Sequence[str]) -> None:
    # The seconds that torchrun gives its processes to save after a signal. Its default is 30.
    process = subprocess.Popen(command, env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"} | os.environ)
    if status := wait_for_child(process.wait, process.terminate):
        raise MaskLLMError(f"step {name} ended with exit status {status}; its own message is above")


def _run_function(name: str, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_guarded, args=(f"step {name}", work, *arguments))
    process.start()
    wait_for_child(process.join, process.terminate)
    if process.exitcode:
        raise MaskLLMError(f"step {name} ended with exit status {process.exitcode}; its own message is above")


def _guarded(program: str, work: Callable[..., Any], *arguments: Any) -> None:
    from maskllm.failures import run_guarded

    def call() -> None:
        work(*arguments)  # its result is not an exit status

    sys.exit(run_guarded(program, call))
