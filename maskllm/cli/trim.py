"""`maskllm trim`."""

from __future__ import annotations

import argparse

from maskllm.export.trim import trim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "--load", required=True, metavar="CKPT", help="trained or pruned checkpoint: its directory or one iteration's"
    )
    parser.add_argument("--output", required=True, metavar="CKPT", help="Megatron checkpoint directory to write")


def run(args: argparse.Namespace) -> None:
    """Trim and say where to."""
    print(f"wrote {trim(args.load, args.output)}")
