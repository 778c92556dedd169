"""`maskllm finetune`, in one process, or in each that torchrun or `accelerate launch` starts."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from typing import TYPE_CHECKING, Any

from maskllm.environment.optional_parts import require_extra
from maskllm.errors import flag

if TYPE_CHECKING:
    from maskllm.finetuning.settings import FinetuneSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb, one for each field of `FinetuneSettings`."""
    require_extra("finetune")
    from maskllm.finetuning.settings import FinetuneSettings

    parser.description = (
        "Make any transformers model sparse for a task: prune it, train the weights that are left (or the masks) against the dense model, "
        "and measure dense, one-shot and trained. A killed run goes on if the command is repeated."
    )
    hints = typing.get_type_hints(FinetuneSettings)
    for entry in dataclasses.fields(FinetuneSettings):
        options: dict[str, Any] = dict(entry.metadata)
        kind = _kind(hints[entry.name])
        if kind is bool:
            options["action"] = "store_true"
        else:
            options.setdefault("type", kind)
        required = entry.name in ("model", "task", "data", "output")
        default = None if required or entry.default == () or entry.default == "" else entry.default
        parser.add_argument(flag(entry.name), required=required, default=default, **options)


def _kind(hint: Any) -> type:
    """The type of one value of a field: that of `float | None` is float, that of a tuple a string unless the option says more."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not types.NoneType)
    return str if typing.get_origin(hint) is tuple else hint


def settings(args: argparse.Namespace) -> FinetuneSettings:
    """The settings that the options say."""
    from maskllm.finetuning.settings import FinetuneSettings

    values = {entry.name: getattr(args, entry.name) for entry in dataclasses.fields(FinetuneSettings)}
    return FinetuneSettings(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if value is not None}
    )


def run(args: argparse.Namespace) -> None:
    """Run all stages; the first process prints the table of the measures."""
    from maskllm.finetuning.run import finetune

    finetune(settings(args))
