"""`maskllm convert`."""

from __future__ import annotations

import argparse
import dataclasses

from maskllm.checkpoints.convert import MAKE_VOCAB_SIZE_DIVISIBLE_BY, convert
from maskllm.cli.measure import measured
from maskllm.cli.options import positive_integer, writable_file
from maskllm.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "--hf", required=True, metavar="DIR_OR_ID", help="Hugging Face checkpoint: a directory with safetensors, or a hub id"
    )
    parser.add_argument("--output", required=True, metavar="CKPT", help="Megatron checkpoint directory to write")
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=positive_integer,
        default=MAKE_VOCAB_SIZE_DIVISIBLE_BY,
        metavar="N",
        help="add rows of zeros to the embedding and the output matrix up to a multiple of N; `export` leaves them out",
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write the numbers to this file")


def run(args: argparse.Namespace) -> None:
    """Convert, then print what was written."""
    with measured() as cost:
        report = convert(args.hf, args.output, make_vocab_size_divisible_by=args.make_vocab_size_divisible_by)
    if args.json:
        write_json(args.json, {"hf": args.hf} | dataclasses.asdict(report) | cost)
    print(f"wrote {report.path}")
    print(f"{report.parameters:,} parameters in {report.tensors:,} tensors, {report.bytes:,} bytes, {cost['seconds']:.1f} s")
