"""`maskllm trim`."""

from __future__ import annotations

import argparse
import dataclasses

from maskllm.checkpoints.info import TRAINED_WEIGHTS
from maskllm.cli.measure import measured
from maskllm.cli.options import writable_file
from maskllm.export.trim import trim
from maskllm.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "--load", required=True, metavar="CKPT", help="trained or pruned checkpoint: its directory or one iteration's"
    )
    parser.add_argument("--output", required=True, metavar="CKPT", help="Megatron checkpoint directory to write")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write the numbers to this file")


def run(args: argparse.Namespace) -> None:
    """Trim, then print what was written."""
    with measured() as cost:
        report = trim(args.load, args.output)
    if args.json:
        write_json(args.json, {"load": args.load} | dataclasses.asdict(report) | cost)
    print(f"wrote {report.path}")
    print(
        f"{report.zeros:,} of {report.pruned_parameters:,} weights of {report.pattern} masked linears are zero "
        f"({report.zeros / report.pruned_parameters:.2%}), {cost['seconds']:.1f} s"
    )
    if report.steps_done is not None:
        planned = "" if report.steps_planned is None else f" of {report.steps_planned:,}"
        print(f"the run had done {report.steps_done:,}{planned} steps")
    if report.is_unfinished:
        print("it was not at its end: its schedules had steps left, and a later checkpoint gives another model")
    if report.trained_weights:
        print(f"the weights were {TRAINED_WEIGHTS}")
