"""What the command lines share."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskllm.errors import MaskLLMError, as_line
from maskllm.files import real_file

DATASET = (".bin", ".idx")
"""What an indexed dataset's files add to its prefix."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, as they would be typed: not those of switches, and not the absence of one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def writable_file(text: str) -> str:
    """An argparse type: the path of a file to write, refused before the work where it could not be written after it."""
    if text == "":
        return text  # `refuse_empty` names the option
    if text == "-":
        raise argparse.ArgumentTypeError("found '-', wanted a file's path (./- for a file of that name)")
    try:
        folder = next(parent for parent in real_file(text).parents if parent.exists())
        if not folder.is_dir():
            raise MaskLLMError(f"{text}: {folder} is not a directory")
        if not os.access(folder, os.W_OK):
            raise MaskLLMError(f"{text}: no permission to write in {folder}")
    except (MaskLLMError, OSError) as error:
        raise argparse.ArgumentTypeError(as_line(error)) from None
    return text


def refuse_empty(options: Mapping[str, Any]) -> None:
    """Raise MaskLLMError for an option (name with underscores -> value) whose value, or one of them, is the empty string.

    It is what a shell's unset variable leaves, and as a path it would mean the working directory.
    """
    for name, value in options.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise MaskLLMError(f"--{name.replace('_', '-')}: found an empty value; give it one, or leave the option out")


def refuse_collisions(options: Mapping[str, Any]) -> None:
    """Raise MaskLLMError where two outputs of a verb are one file, a file would lie in the directory that the verb makes, or one that it
    reads would be written over."""
    places = {
        name: Path(os.path.realpath(options[name])) for name in ("output", "mask_file", "json") if options.get(name) is not None
    }
    taken: dict[Path, str] = {}
    for name in ("input", "data", "mask", "corpus", "eval_corpus", "calibration_data", "tokenizer"):
        values = options.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            taken |= {
                Path(os.path.realpath(f"{value}{suffix}")): f"--{name.replace('_', '-')} {value}" for suffix in ("", *DATASET)
            }
    if options.get("output_prefix"):
        prefix = f"{options['output_prefix']}_{options['json_key']}_document"
        taken |= {Path(os.path.realpath(f"{prefix}{suffix}")): f"--output-prefix {options['output_prefix']}" for suffix in DATASET}
    for name in ("mask_file", "json"):
        if (other := taken.get(places.get(name))) is not None:
            raise MaskLLMError(f"--{name.replace('_', '-')} {options[name]}: is a file of {other}; name another")
    if options["verb"] in ("convert", "prune", "trim"):
        places["output"] /= "release"
    for (first, place), (second, other) in itertools.combinations(places.items(), 2):
        if place.is_relative_to(other) or other.is_relative_to(place):
            flags = [f"--{name.replace('_', '-')} {options[name]}" for name in (first, second)]
            raise MaskLLMError(f"{' and '.join(flags)}: one is, or lies in, the other; name places apart from each other")
