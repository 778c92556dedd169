"""Run a pipeline step by step, each in processes of its own, once: a finished step is skipped when the pipeline is run again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from maskllm.errors import MaskLLMError, StoppedError
from maskllm.families.hf_config import read_json_object
from maskllm.files import write_json

SAMPLE_SECONDS = 0.5


class Steps:
    """The steps of one output directory, and in its `steps.json` what finished with which settings, how long and how large.

    A step's identity is what it was told and the identities of all steps before it, so a changed setting repeats the steps from
    there on and no others.
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
        self, name: str, output: Path, work: Callable[..., Any] | Sequence[object], *arguments: Any, goes_on: bool = False
    ) -> None:
        """Do a step, unless it has been done: call `work(*arguments)` in a process of its own, or run the command `work`.

        What `output` holds is removed first, except where the step was cut short and `goes_on` from it. A step's own files beside
        `output` stay. Raises MaskLLMError where the step fails, and StoppedError after SIGTERM, which the step's process gets too.
        """
        self.names.append(name)
        command = None if callable(work) else [str(part) for part in work]
        # Where the interpreter lies, a command's first word, is no setting.
        told = command[1:] if command else [f"{work.__module__}.{work.__qualname__}", *map(str, arguments)]
        self._identity = hashlib.sha256(json.dumps([self._identity, told]).encode()).hexdigest()
        record = self.records.get(name, {})
        if record.get("identity") == self._identity and "seconds" in record and output.exists():
            print(f"[{name}] done before", file=sys.stderr, flush=True)
            return
        print(f"[{name}] {shlex.join(command) if command else work.__doc__.splitlines()[0]}", file=sys.stderr, flush=True)
        cut_short = record.get("identity") == self._identity and "seconds" not in record
        if not (cut_short and goes_on):
            _remove(output)
        if not cut_short:
            record = {"identity": self._identity, "told": told, "seconds_before": 0.0}
            self._note(name, record)  # so that even a killed step is known, and gone on from
        started = time.perf_counter()
        with peak_memory() as peak:
            try:
                if command:
                    _run_command(name, command)
                else:
                    _run_function(name, work, arguments)
            except BaseException:
                record["seconds_before"] += time.perf_counter() - started
                self._note(name, record)
                raise
        seconds = record.pop("seconds_before") + time.perf_counter() - started
        self._note(name, record | {"seconds": seconds, "peak_memory_bytes": peak["bytes"]})

    def _note(self, name: str, record: dict[str, Any]) -> None:
        self.records[name] = record
        write_json(self.file, self.records)


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


@contextlib.contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Watch the memory of this process and all its descendants together; the mapping's "bytes" is the most seen so far.

    Shared pages count once (proportional set size) where the system tells (Linux).
    """
    peak = {"bytes": 0}
    stop = threading.Event()

    def watch() -> None:
        while True:
            peak["bytes"] = max(peak["bytes"], _tree_memory())
            if stop.wait(SAMPLE_SECONDS):
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
        with contextlib.suppress(psutil.Error):  # it has just ended
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
    return total


def _waited(wait: Callable[[], Any], terminate: Callable[[], None]) -> Any:
    """What `wait`, for a process to end, returns; a signal to this process reaches that one too and raises once it has ended.

    Raises StoppedError after SIGTERM, and KeyboardInterrupt after SIGINT, which the terminal has sent to both.
    """
    received: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        received.append(number)
        terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        result = wait()
    except KeyboardInterrupt:
        wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if received:
        raise StoppedError("stopped by a signal; run the same command to go on")
    return result


def _run_command(name: str, command: Sequence[str]) -> None:
    # How long torchrun lets its processes save after a signal; its default is 30 seconds.
    process = subprocess.Popen(command, env={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "240"} | os.environ)
    if status := _waited(process.wait, process.terminate):
        raise MaskLLMError(f"step {name} ended with exit status {status}; its own message is above")


def _run_function(name: str, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_guarded, args=(f"step {name}", work, *arguments))
    process.start()
    _waited(process.join, process.terminate)
    if process.exitcode:
        raise MaskLLMError(f"step {name} ended with exit status {process.exitcode}; its own message is above")


def _guarded(program: str, work: Callable[..., Any], *arguments: Any) -> None:
    from maskllm.cli import run_guarded

    def call() -> None:
        work(*arguments)  # what it returns is no exit status

    sys.exit(run_guarded(program, call))
