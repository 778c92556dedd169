"""Functions with which the tests run the launch scripts."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = EXAMPLES / "run.sh"
RECIPES = ["llama2-7b", "llama2-13b", "llama3-8b", "llama3.1-8b", "nemotron4-15b", "gpt3-843m", "gpt3-2b"]
ALL = ["1_download", "2_preprocess", "3_convert", "4_prune", "5_train", "7_trim", "8_export", "9_evaluate"]
STEPS = [*ALL, "5_train_multinode", "5_train_weights", "6_resume"]
DOMAIN = "llama2-7b-domain"
"""The recipe for a domain's mask, which has other settings than RECIPES."""


def environment(**settings: object) -> dict[str, str]:
    """The environment of a script: `settings`, the programs of this Python, and none of the settings in the user's shell."""
    here = {name: os.environ[name] for name in ("HOME", "PYTHONPATH", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return here | {"PATH": path, "PYTHON": sys.executable, **{name: str(value) for name, value in settings.items()}}


def script(name: str) -> ModuleType:
    """The script examples/finetune/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / "finetune" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_ins(folder: Path, **texts: str) -> str:
    """Write scripts that take the place of programs into `folder`/bin; returns the PATH that finds them first."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return f"{folder / 'bin'}{os.pathsep}{environment()['PATH']}"


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port that no other process is given during the block. Servers that set SO_REUSEADDR, as torchrun's does, can listen on it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def bash(script: Path, cwd: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    command = ["bash", script, *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=environment(**settings),
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=900)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # not SIGKILL: torchrun then ends its processes
            process.communicate(timeout=60)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def dry_run(recipe: str, step: str, cwd: Path, **settings: object) -> list[list[str]]:
    """The commands that a step would run, as words."""
    done = bash(RUN, cwd, recipe, step, DRY_RUN=1, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


def parse_verb(words: list[str]) -> argparse.Namespace:
    """Parse `maskllm VERB ...` as the console command does, without running it."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"maskllm.cli.{words[1]}").add_arguments(parser)
    return parser.parse_args(words[2:])


def split_torchrun(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """torchrun's options, parsed by torchrun itself, and the command of each process."""
    from torch.distributed.run import parse_args

    assert words[0] == "torchrun"
    options = parse_args(words[1:])
    assert options.module
    return vars(options), [options.training_script, *options.training_script_args]
