"""The command line of training, generated from the fields of `TrainArguments`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from maskllm.cli.options import HelpFormatter, refuse_empty
from maskllm.errors import flag
from maskllm.training.arguments import TrainArguments


def parse_arguments(argv: Sequence[str] | None = None) -> TrainArguments:
    """Read the command line of `python -m maskllm.train`. Raises MaskLLMError for an empty value."""
    parser = argparse.ArgumentParser(
        prog="torchrun ... -m maskllm.train",
        description="Train a Megatron checkpoint's N:M masks, its weights under masks, or both.",
        formatter_class=HelpFormatter,
    )
    add_options(parser, [entry.name for entry in dataclasses.fields(TrainArguments)])
    values = vars(parser.parse_args(argv))
    refuse_empty(values)
    return TrainArguments(**option_values(values))


def add_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add an option to `parser` for each of these fields of `TrainArguments`."""
    for entry in dataclasses.fields(TrainArguments):
        if entry.name not in names:
            continue
        options = dict(entry.metadata)
        if entry.type == "bool":
            parser.add_argument(flag(entry.name), action="store_true", **options)
        else:
            kinds = {"int": int, "int | None": int, "float": float, "float | None": float, "tuple[float, float]": float}
            required = entry.name == "data_path"
            parser.add_argument(
                flag(entry.name),
                type=kinds.get(entry.type, str),
                required=required,
                default=None if required else entry.default,
                **options,
            )


def option_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed `values` that are fields of `TrainArguments`, in the types of the fields."""
    names = {entry.name: entry.type for entry in dataclasses.fields(TrainArguments)}
    return {
        name: tuple(value) if names[name] == "tuple[float, float]" else value for name, value in values.items() if name in names
    }
