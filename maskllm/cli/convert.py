"""`maskllm convert`."""

from __future__ import annotations

import argparse

from maskllm.models.convert import convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "--hf", required=True, metavar="DIR_OR_ID", help="Hugging Face checkpoint: a directory with safetensors, or a hub id"
    )
    parser.add_argument("--output", required=True, metavar="CKPT", help="Megatron checkpoint directory to write")


def run(args: argparse.Namespace) -> None:
    """Convert and say where to."""
    print(f"wrote {convert(args.hf, args.output)}")
