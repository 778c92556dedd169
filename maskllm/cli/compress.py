"""`maskllm compress`."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter

from maskllm.cli.measure import measured
from maskllm.cli.options import writable_file
from maskllm.errors import MaskLLMError, flag
from maskllm.export.compress import BITS, CompressReport, CompressSettings, compress, decompress
from maskllm.files import write_json
from maskllm.huggingface.mask_file import open_masks
from maskllm.patterns import Pattern

_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    defaults = CompressSettings()
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="sparse Hugging Face checkpoint, directory or hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--mask",
        metavar="F.npz_OR_ID",
        help="mask file to apply to the weights of --model first, or the hub id of a repository that holds one",
    )
    parser.add_argument("--bits", type=int, choices=BITS, help="bits of a kept weight; default: the checkpoint's dtype, unchanged")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="G",
        help=f"with --bits 8 or 4, the columns that share a scale; -1: a whole row; default: {defaults.group_size}",
    )
    parser.add_argument("--pattern", metavar="N:M", help="compress only matrices of this pattern; default: find each matrix's own")
    parser.add_argument("--decompress", action="store_true", help="write the dense checkpoint that --model was made of instead")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write the numbers to this file")


def run(args: argparse.Namespace) -> None:
    """Compress or decompress, then print what was written."""
    if args.decompress:
        for name in ("mask", "bits", "group_size", "pattern"):
            if getattr(args, name) is not None:
                raise MaskLLMError(f"{flag(name)}: does not go with --decompress, which undoes what was done")
        with measured() as cost:
            size = decompress(args.model, args.output)
        if args.json:
            write_json(args.json, {"model": args.model, "bytes": size} | cost)
        print(f"wrote {args.output}: {size:,} bytes of tensors")
        return
    settings = CompressSettings(args.bits, pattern=None if args.pattern is None else Pattern.parse(args.pattern))
    if args.group_size is not None:
        if args.bits not in (8, 4):
            raise MaskLLMError(f"--group-size {args.group_size}: scales belong to --bits 8 and 4")
        if args.group_size != -1 and args.group_size <= 0:
            raise MaskLLMError(f"--group-size {args.group_size}: wanted a positive number or -1")
        settings = dataclasses.replace(settings, group_size=args.group_size)
    masks = open_masks(args.mask)
    with measured() as cost:
        report = compress(args.model, args.output, settings, masks=masks)
    if args.json:
        write_json(args.json, {"model": args.model, "mask": args.mask} | dataclasses.asdict(report) | cost)
    _print(args.output, report)


def _print(output: str, report: CompressReport) -> None:
    print(f"wrote {output}: {report.bytes:,} bytes of tensors, {report.bytes / report.bytes_before:.3f} of {report.bytes_before:,}")
    counts = Counter(matrix["pattern"] or "unstructured" for matrix in report.matrices.values())
    kinds = ", ".join(f"{pattern}: {count}" for pattern, count in counts.most_common())
    print(
        f"{len(report.matrices)} matrices compressed ({kinds}) to {report.compressed_bytes:,} bytes, "
        f"{report.compressed_bytes / report.dense_bytes:.3f} of {report.dense_bytes:,}"
    )
    for name, zeros in list(report.dense.items())[:_SHOWN]:
        print(f"stays dense: {name} ({'its dtype has no compressed form' if zeros is None else f'{zeros:.1%} zeros'})")
    if len(report.dense) > _SHOWN:
        print(f"stay dense: {len(report.dense) - _SHOWN} more; --json names them")
    if report.negative_zeros:
        print(f"{report.negative_zeros:,} zeros lost their negative sign, which changes no product")
