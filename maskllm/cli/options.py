"""Shared by the command lines: the format of help, and checks of option values before any work starts."""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskllm.data.dataset_files import dataset_files, document_prefix
from maskllm.errors import MaskLLMError, as_line, flag
from maskllm.files import real_file


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default as the user would type it, and none for switches and for options that are off by default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def writable_file(text: str) -> str:
    """An argparse type: the path of a file to write after the work. Refuses a path that cannot be written, before the work."""
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


def positive_integer(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted a positive integer")
    return int(text)


def refuse_empty(options: Mapping[str, Any]) -> None:
    """Raise MaskLLMError if an option (field name -> value) is, or contains, the empty string.

    An unset shell variable gives an empty string. As a path it would mean the working directory.
    """
    for name, value in options.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise MaskLLMError(f"{flag(name)}: found an empty value; give it one, or leave the option out")


def refuse_collisions(options: Mapping[str, Any]) -> None:
    """Raise MaskLLMError if two outputs of a verb collide or an output would overwrite an input.

    Outputs collide if they are the same file, or if one lies in the directory that another one replaces.
    """
    places = {
        name: Path(os.path.realpath(options[name]))
        for name in ("output", "mask_file", "json", "figure")
        if options.get(name) is not None
    }
    taken: dict[Path, str] = {}
    for name in ("input", "data", "mask", "mask_base", "corpus", "eval_corpus", "calibration_data", "tokenizer"):
        values = options.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            taken |= {Path(os.path.realpath(file)): f"{flag(name)} {value}" for file in (value, *dataset_files(value))}
    if options.get("output_prefix"):
        files = dataset_files(document_prefix(options["output_prefix"], options["json_key"]))
        taken |= {Path(os.path.realpath(file)): f"--output-prefix {options['output_prefix']}" for file in files}
    for name in ("mask_file", "json", "figure"):
        if (other := taken.get(places.get(name))) is not None:
            raise MaskLLMError(f"{flag(name)} {options[name]}: is a file of {other}; name another")
    if options["verb"] in ("convert", "prune", "trim"):
        places["output"] /= "release"
    for (first, place), (second, other) in itertools.combinations(places.items(), 2):
        if place.is_relative_to(other) or other.is_relative_to(place):
            flags = [f"{flag(name)} {options[name]}" for name in (first, second)]
            raise MaskLLMError(f"{' and '.join(flags)}: one is, or lies in, the other; name places apart from each other")
