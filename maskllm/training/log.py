"""Where metrics go: the console, TensorBoard, and a JSON-lines file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from maskllm.errors import MaskLLMError
from maskllm.files import write_text


class MetricsWriter:
    """Writes a step's metrics on the one rank that has them: a line on the console, TensorBoard scalars, a JSON line.

    A JSON line's `kind` is "train" or "validation". A resumed run continues the file, without the lines of steps that it will repeat.
    """

    def __init__(self, file: Path | None, tensorboard_dir: str | None, start_iteration: int, console: TextIO) -> None:
        self.console = console
        self.file = None
        if file is not None:
            write_text(file, "".join(_lines_before(file, start_iteration)))
            self.file = file.open("a", encoding="utf-8")
        self.board = None
        if tensorboard_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(tensorboard_dir, purge_step=start_iteration + 1)

    def write(self, kind: str, iteration: int, values: dict[str, Any]) -> None:
        """Report `values` of the step that ends as number `iteration` (the first is 1).

        Raises MaskLLMError with the name of the file or directory if it cannot be written.
        """
        line = {"kind": kind, "iteration": iteration, **values}
        if self.file is not None:
            with _named(self.file.name):
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
        if self.board is not None:
            with _named(self.board.log_dir):
                for name, value in values.items():
                    if value is not None:
                        self.board.add_scalar(f"{kind}/{name}", value, iteration)
                self.board.flush()
        text = " | ".join(f"{name.replace('_', ' ')} {_format(value)}" for name, value in values.items() if value is not None)
        print(f"{kind} iteration {iteration} | {text}", file=self.console, flush=True)

    def close(self) -> None:
        """Close the files."""
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """A block that writes to `path`: the operating system's error for a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise MaskLLMError(f"{path}: cannot be written ({error.strerror or error})") from error


def _lines_before(file: Path, start_iteration: int) -> list[str]:
    """The complete lines in `file` of steps up to `start_iteration`."""
    kept = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["iteration"] <= start_iteration:
                    kept.append(line)
            except (ValueError, KeyError):
                break  # a killed run left half a line
    return kept


def _format(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
