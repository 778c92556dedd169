"""The fastest cuSPARSELt algorithm of each product, in a file that later runs read."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from maskllm.errors import MaskLLMError
from maskllm.files import write_json

_FEWEST_TOKENS = 8
"""cuSPARSELt multiplies a multiple of this number of tokens; the operator adds rows if there are fewer."""


class AlgorithmCache:
    """The fastest cuSPARSELt algorithm of each product, in a JSON file that later runs read.

    A key holds everything that the choice depends on: shape, dtype, bias, activation, GPU and library version. The file is
    `$MASKLLM_CACHE_DIR/cusparselt.json`; the default folder is `~/.cache/maskllm`. If it cannot be read or written, a warning says so
    once, and the process keeps its algorithms to itself. Raises MaskLLMError if the file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        folder = Path(os.environ.get("MASKLLM_CACHE_DIR", Path.home() / ".cache" / "maskllm"))
        self.path = folder / "cusparselt.json" if path is None else path
        self._has_warned = False
        self._choices: dict[str, list[int]] = {}
        try:
            self._choices = self._read()
        except OSError as error:
            self._warn(error)

    def _read(self) -> dict[str, list[int]]:
        if not self.path.exists():
            return {}
        try:
            choices = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MaskLLMError(f"{self.path}: not JSON ({error}); delete it, and new searches will write it again") from error
        for key, choice in choices.items() if isinstance(choices, dict) else [("the file", choices)]:
            if not (isinstance(choice, list) and len(choice) in (0, 4) and all(type(number) is int for number in choice)):
                raise MaskLLMError(
                    f"{self.path}: {key}: wanted a list of four integers or none; delete the file, and new searches will write it again"
                )
        return choices

    def get(self, key: str) -> list[int] | None:
        """The algorithm found for `key`, an empty list if torch's dense product is faster, or None if nobody has looked yet."""
        return self._choices.get(key)

    def put(self, key: str, choice: list[int]) -> None:
        """Store an algorithm and write the file, including what other processes have added in the meantime."""
        self._choices[key] = list(choice)
        self._update(lambda choices: choices | {key: list(choice)})

    def drop(self, key: str) -> None:
        """Forget the algorithm of `key`, in the file too if it can be written."""
        self._choices.pop(key, None)
        self._update(lambda choices: {other: choice for other, choice in choices.items() if other != key})

    def refuse(self, key: str, error: RuntimeError, instead: str) -> None:
        """Forget the algorithm of `key`, which the library refused with `error`, and warn. `instead` says what is in use now.

        Raises `error` if it is not the library's.
        """
        if not str(error).startswith("cuSPARSELt: "):
            raise error
        choice = self.get(key)
        self.drop(key)
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"{self.path}: the algorithm {choice} of {key!r} does not work here ({reason}); it is removed, and {instead}",
            RuntimeWarning,
            stacklevel=4,
        )

    def _update(self, change: Callable[[dict[str, list[int]]], dict[str, list[int]]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file releases the lock
                choices = change(self._read())
                write_json(self.path, choices)
        except OSError as error:
            self._warn(error)
        else:
            self._choices = choices

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.path}: cannot be read or written ({error}); every process searches cuSPARSELt's algorithms again. Name another "
                "folder in MASKLLM_CACHE_DIR",
                RuntimeWarning,
                stacklevel=4,
            )


def token_bucket(tokens: int) -> int:
    """The number of tokens to search an algorithm for: the next power of two, at least 8. Few searches serve all sizes."""
    return max(_FEWEST_TOKENS, 1 << (tokens - 1).bit_length())


def algorithm_key(
    out_features: int, in_features: int, tokens: int, dtype: torch.dtype, bias: bool, activation: str, gpu: str, version: int
) -> str:
    """The key of a product in the cache. `tokens` comes from `token_bucket`."""
    return f"{out_features}x{in_features}x{tokens} {dtype} bias={int(bias)} activation={activation or 'none'} {gpu} cuSPARSELt {version}"
