"""What the command lines share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskllm.errors import MaskLLMError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, as they would be typed: not those of switches, and not the absence of one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def writable_file(text: str) -> str:
    """An argparse type: the path of a file to write, refused before the work where it could not be written after it.

    What is there must be a regular file: outputs take their place by a rename, which would do away with a pipe or a device.
    """
    path = Path(text).absolute()
    if text and path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(
            f"{text}: is {'a directory' if path.is_dir() else 'no regular file'}, wanted a file to write"
        )
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {folder} is not a directory")
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: no permission to write in {folder}")
    return text


def refuse_empty(options: Mapping[str, Any]) -> None:
    """Raise MaskLLMError for an option (name with underscores -> value) whose value, or one of them, is the empty string.

    It is what a shell's unset variable leaves, and as a path it would mean the working directory.
    """
    for name, value in options.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise MaskLLMError(f"--{name.replace('_', '-')}: found an empty value; give it one, or leave the option out")
