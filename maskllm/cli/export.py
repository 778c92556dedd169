"""`maskllm export`."""

from __future__ import annotations

import argparse
import dataclasses

from maskllm.checkpoints.info import TRAINED_WEIGHTS
from maskllm.cli.measure import measured
from maskllm.cli.options import writable_file
from maskllm.export.huggingface import export
from maskllm.files import write_json
from maskllm.huggingface.shards import MAX_SHARD_SIZE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "--load", required=True, metavar="CKPT", help="dense or trimmed checkpoint: its directory or one iteration's"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="Hugging Face checkpoint directory to write")
    parser.add_argument("--mask-file", type=writable_file, metavar="F.npz", help="also write the masks to this file")
    parser.add_argument(
        "--mask-base", metavar="G.npz_OR_ID", help="write --mask-file as a difference to this mask file, which makes it small"
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write the numbers to this file")
    parser.add_argument("--max-shard-size", default=MAX_SHARD_SIZE, metavar="SIZE", help="largest safetensors file to write")


def run(args: argparse.Namespace) -> None:
    """Export, then print what was written."""
    with measured() as cost:
        report = export(
            args.load, args.output, mask_file=args.mask_file, mask_base=args.mask_base, max_shard_size=args.max_shard_size
        )
    if args.json:
        write_json(args.json, {"load": args.load} | dataclasses.asdict(report) | cost)
    print(f"wrote {args.output}" + (f" and {args.mask_file}" if args.mask_file else ""))
    print(f"{report.parameters:,} parameters, {report.bytes:,} bytes, weights sha256 {report.weights_sha256}")
    if report.pruned_parameters:
        print(
            f"{report.zeros:,} of {report.pruned_parameters:,} pruned weights are zero ({report.zeros / report.pruned_parameters:.2%})"
        )
    if report.trained_weights:
        print(f"the weights were {TRAINED_WEIGHTS}")
