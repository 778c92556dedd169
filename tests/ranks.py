"""Jobs under torchrun that run one program after another, so that their processes import PyTorch and Megatron once.

usage: torchrun ... -m tests.ranks FOLDER

A rank runs the program in FOLDER/1.json, then that in 2.json and so on, as `python` does, its output in NUMBER.RANK.log, and leaves the
exit status in NUMBER.RANK.status.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

POLL_SECONDS = 0.05
PROGRAMS = 10
"""Programs that a job runs: some of the process groups that they set up stay, and take memory."""


PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends and even where this one is stopped (prctl(2))."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Pool:
    """A job for each number of ranks, one thread each, started when it is first used."""

    def __init__(self) -> None:
        self._jobs: dict[int, tuple[subprocess.Popen, Path]] = {}

    def __call__(self, ranks: int, module: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess:
        """Run `python -m MODULE ARGUMENTS` in each of `ranks` ranks; `stderr` of the result is what they print, rank after rank."""
        folder = self.folder(ranks)
        job, _ = self._jobs[ranks]
        done = ask(folder, ranks, ["-m", module, *map(str, arguments)], lambda: job.poll() is None)
        if done.returncode < 0:  # it hangs or has died
            self._end(ranks)
        assert not check or done.returncode == 0, done.stderr
        return done

    def folder(self, ranks: int) -> Path:
        """Where the job of so many ranks is asked, a new one after PROGRAMS programs."""
        if ranks in self._jobs and len(list(self._jobs[ranks][1].glob("*.taken"))) >= PROGRAMS:
            self._end(ranks)
        if ranks not in self._jobs:
            folder = Path(tempfile.mkdtemp(prefix="ranks"))
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            with (folder / "torchrun.log").open("w") as log:
                job = subprocess.Popen(
                    [*command, "-m", "tests.ranks", folder],
                    stdout=log,
                    stderr=log,
                    preexec_fn=_end_with_parent,
                    cwd=Path(__file__).parents[1],
                    env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                )
            self._jobs[ranks] = job, folder
        return self._jobs[ranks][1]

    def programs(self, folder: Path) -> Path:
        """Write stand-ins for python, maskllm and torchrun (of two ranks) that ask the jobs into `folder`; returns python's."""
        root, folders = str(Path(__file__).parents[1]), {ranks: str(self.folder(ranks)) for ranks in (1, 2)}
        for name, first in {"python": [], "maskllm": ["-m", "maskllm"], "torchrun": _TORCHRUN}.items():
            words = f"{first} + sys.argv[1:]"
            (folder / name).write_text(
                f"#!{sys.executable} -ISE\nimport sys\nsys.path.insert(0, {root!r})\n"
                f"from tests.ranks import python\nsys.exit(python({folders}, {words}))\n"
            )
            (folder / name).chmod(0o755)
        return folder / "python"

    def close(self) -> None:
        """End all jobs."""
        for ranks in list(self._jobs):
            self._end(ranks)

    def _end(self, ranks: int) -> None:
        job, folder = self._jobs.pop(ranks)
        job.kill()
        _signal_ranks(folder, signal.SIGKILL)
        job.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def ask(folder: Path, ranks: int, words: Sequence[str], alive: Callable[[], bool] = lambda: True) -> subprocess.CompletedProcess:
    """Have the job of `ranks` processes that serves `folder` run `python WORDS` (-m MODULE or FILE, and arguments) in this directory.

    The status is negative where it does not answer within fifteen minutes, or is not `alive` before. In between the ranks are stopped: the
    process groups that programs leave behind have threads that wake a hundred times a second.
    """
    number = 1
    while True:  # others may be asking too
        try:
            (folder / f"{number}.taken").touch(exist_ok=False)
            break
        except FileExistsError:
            number += 1
    part = folder / f"{number}.part"
    part.write_text(json.dumps({"words": list(words), "directory": str(Path.cwd())}))
    part.rename(folder / f"{number}.json")
    replies = [folder / f"{number}.{rank}.status" for rank in range(ranks)]
    deadline = time.monotonic() + 900
    while not all(reply.exists() for reply in replies) and alive() and time.monotonic() < deadline:
        _signal_ranks(folder, signal.SIGCONT)  # again and again: another's answer may stop them
        time.sleep(POLL_SECONDS)
    _signal_ranks(folder, signal.SIGSTOP)
    status = max(int(reply.read_text()) for reply in replies) if all(reply.exists() for reply in replies) else -1
    logs = [folder / f"{number}.{rank}.log" for rank in range(ranks)]
    output = "".join(log.read_text() for log in [*logs, folder / "torchrun.log"] if log.exists())
    return subprocess.CompletedProcess(words, status, "", output)


def _signal_ranks(folder: Path, number: signal.Signals) -> None:
    """Send a signal to those ranks of the job that have started."""
    for file in folder.glob("*.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.read_text()), number)


_TORCHRUN = ["-m", "torch.distributed.run"]


def python(folders: dict[int, str], words: list[str]) -> int:
    """`python WORDS` by the job that serves one of `folders`, the one of as many ranks as torchrun is to start; the exit status."""
    ranks = 1
    if words[:2] == _TORCHRUN:
        program = words.index("-m", 2)
        options = " ".join(words[2:program]).replace("=", " ").split()
        ranks, words = int(options[options.index("--nproc-per-node") + 1]), words[program:]
    done = ask(Path(folders[ranks]), ranks, words)
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


@contextlib.contextmanager
def _as_new(log: Path, directory: str) -> Iterator[None]:
    """A block that runs a program in `directory`, its output and its children's in `log`, and leaves the process as it was."""
    before = {number: os.dup(number) for number in (1, 2)}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    home = Path.cwd()
    os.chdir(directory)
    with log.open("wb", buffering=0) as file:
        for number in before:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in before.items():
            os.dup2(saved, number)
            os.close(saved)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.chdir(home)


def _run(words: list[str]) -> int:
    """`python WORDS` in this process; returns the exit status."""
    try:
        if words[0] == "-m":
            sys.argv[1:] = words[2:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[1:] = words[1:]
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(folder: Path) -> None:
    """Serve until killed."""
    _end_with_parent()
    rank, number = os.environ["RANK"], 0
    part = folder / f"{rank}.pid.part"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{rank}.pid")
    while True:
        number += 1
        request = folder / f"{number}.json"
        while not request.exists():
            time.sleep(POLL_SECONDS)
        asked = json.loads(request.read_text())
        with _as_new(folder / f"{number}.{rank}.log", asked["directory"]):
            status = _run(asked["words"])
        gc.collect()  # a model holds itself, and with it its process groups, whose threads would go on polling
        reply = folder / f"{number}.{rank}.part"
        reply.write_text(str(status))
        reply.rename(reply.with_suffix(".status"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
