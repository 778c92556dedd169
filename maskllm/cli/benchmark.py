"""`maskllm benchmark`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from maskllm.cli.compute_options import add_compute_options, dtype_of
from maskllm.cli.options import positive_integer, writable_file
from maskllm.dtypes import dtype_name
from maskllm.files import write_json
from maskllm.inference.benchmark import BenchmarkSettings, benchmark, check_figure, draw, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.description = (
        "Write tokens with each model in turn, each in a process of its own, and print the time to the first token, tokens and whole texts "
        "a second, bytes of weights and peak memory. Prompts are random tokens, speech models hear noise, and no token ends a text."
    )
    defaults = BenchmarkSettings()
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="Hugging Face checkpoint, dense or compressed")
    parser.add_argument("--against", nargs="+", metavar="DIR_OR_ID", help="other checkpoints to measure in the same run")
    parser.add_argument(
        "--prompt-tokens",
        type=positive_integer,
        default=defaults.prompt_tokens,
        metavar="N",
        help="tokens of each prompt; not for speech models",
    )
    parser.add_argument(
        "--new-tokens", type=_at_least_two, default=defaults.new_tokens, metavar="N", help="tokens to write for each prompt"
    )
    parser.add_argument("--rows", type=positive_integer, default=defaults.rows, metavar="N", help="prompts, or recordings, at once")
    add_compute_options(parser)
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument(
        "--figure", type=writable_file, metavar="F.svg", help="draw the numbers, in the format of the file's ending"
    )


def _at_least_two(text: str) -> int:
    """A number of at least 2: the time between tokens is measured."""
    number = positive_integer(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text}: wanted at least 2")
    return number


def run(args: argparse.Namespace) -> None:
    """Measure, and print the table."""
    settings = BenchmarkSettings(args.prompt_tokens, args.new_tokens, args.rows, dtype_of(args), args.device)
    if args.figure:
        check_figure(Path(args.figure))
    results = benchmark([args.model, *(args.against or [])], settings)
    print(table(results))
    if args.json:
        values = dataclasses.asdict(settings) | {"dtype": None if settings.dtype is None else dtype_name(settings.dtype)}
        write_json(args.json, {"settings": values, "results": [dataclasses.asdict(result) for result in results]})
    if args.figure:
        draw(results, Path(args.figure))
