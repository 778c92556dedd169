"""`maskllm verify`."""

from __future__ import annotations

import argparse
import dataclasses

from maskllm.cli.measure import measured
from maskllm.cli.options import writable_file
from maskllm.errors import MaskLLMError
from maskllm.export.verify import verify
from maskllm.files import write_json
from maskllm.huggingface.mask_file import open_masks
from maskllm.patterns import Pattern

UNREADABLE = 2
"""The exit status for input that cannot be read, as that of cmp and diff: 1 says that something is not as claimed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help="Hugging Face checkpoint to check, directory or hub id; it may be compressed",
    )
    parser.add_argument(
        "--mask", metavar="F.npz_OR_ID", help="mask file, or the hub id of one: the weights that it removes have to be zero"
    )
    parser.add_argument(
        "--mask-base",
        metavar="G.npz_OR_ID",
        help="if --mask is a difference: the mask file that it is a difference to",
    )
    parser.add_argument(
        "--dense",
        metavar="DIR_OR_ID",
        help="the dense model: kept weights and all other tensors have to be its own, bit for bit, unless --model says otherwise",
    )
    parser.add_argument("--pattern", metavar="N:M", help="the pattern that every matrix of the blocks has to have")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write the result to this file, matrix by matrix")


def run(args: argparse.Namespace) -> int:
    """Verify and print what was found; returns 1 if something is not as claimed."""
    try:
        pattern = None if args.pattern is None else Pattern.parse(args.pattern)
        masks = open_masks(args.mask, args.mask_base)
        with measured() as cost:
            found = verify(args.model, masks=masks, dense=args.dense, pattern=pattern)
    except (MaskLLMError, OSError) as error:
        error.exit_status = UNREADABLE
        raise
    if args.json:
        write_json(args.json, dataclasses.asdict(found) | {"as_claimed": not found.findings} | cost)
    print("\n".join(found.lines()))
    return 1 if found.findings else 0
