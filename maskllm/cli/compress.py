"""`maskllm compress`."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterable

from maskllm.cli.calibration_options import CALIBRATION_OPTIONS, add_calibration_options, calibration_of
from maskllm.cli.compute_options import add_compute_options, dtype_of
from maskllm.cli.measure import measured
from maskllm.cli.options import writable_file
from maskllm.errors import MaskLLMError, flag
from maskllm.export.compress import BITS, CompressReport, CompressSettings, compress, decompress
from maskllm.files import write_json
from maskllm.huggingface.mask_file import open_masks
from maskllm.patterns import Pattern
from maskllm.pruning.calibration import is_indexed

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
    parser.add_argument(
        "--mask-base", metavar="G.npz_OR_ID", help="if --mask is a difference: the mask file that it is a difference to"
    )
    parser.add_argument("--bits", type=int, choices=BITS, help="bits of a kept weight; default: the checkpoint's dtype, unchanged")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="G",
        help=f"with --bits 8 or 4, the columns that share a scale; -1: a whole row; default: {defaults.group_size}",
    )
    parser.add_argument("--pattern", metavar="N:M", help="compress only matrices of this pattern; default: find each matrix's own")
    add_calibration_options(
        parser,
        "with --bits 8 or 4, of a causal language model: round so that the outputs on this text change least; default: round each "
        "weight to the nearest",
    )
    add_compute_options(parser)
    parser.add_argument("--decompress", action="store_true", help="write the dense checkpoint that --model was made of instead")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write the numbers to this file")


def run(args: argparse.Namespace) -> None:
    """Compress or decompress, then print what was written."""
    if args.decompress:
        others = ("mask", "mask_base", "bits", "group_size", "pattern", "calibration_data", "params_dtype", "device")
        for name in (*others, *CALIBRATION_OPTIONS):
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
    calibration = calibration_of(args, dtype_of(args))
    for name in ("params_dtype", "device"):
        if calibration is None and getattr(args, name) is not None:
            raise MaskLLMError(f"{flag(name)}: nothing is computed without --calibration-data")
    if calibration is not None and is_indexed(calibration.data):
        import megatron_patches

        megatron_patches.import_megatron()
    masks = open_masks(args.mask, args.mask_base)
    with measured() as cost:
        report = compress(args.model, args.output, settings, masks=masks, calibration=calibration, device=args.device)
    if args.json:
        write_json(
            args.json, {"model": args.model, "mask": args.mask, "mask_base": args.mask_base} | dataclasses.asdict(report) | cost
        )
    _print(args.output, report)


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / max(1, len(known))


def _print(output: str, report: CompressReport) -> None:
    print(f"wrote {output}: {report.bytes:,} bytes of tensors, {report.bytes / report.bytes_before:.3f} of {report.bytes_before:,}")
    counts = Counter(matrix["pattern"] or "unstructured" for matrix in report.matrices.values())
    kinds = ", ".join(f"{pattern}: {count}" for pattern, count in counts.most_common())
    print(
        f"{len(report.matrices)} matrices compressed ({kinds}) to {report.compressed_bytes:,} bytes, "
        f"{report.compressed_bytes / report.dense_bytes:.3f} of {report.dense_bytes:,}"
    )
    if report.calibration is not None:
        swept = [matrix for matrix in report.matrices.values() if "relative_error" in matrix]
        error, nearest = (_mean(matrix[key] for matrix in swept) for key in ("relative_error", "nearest_error"))
        print(
            f"{len(swept)} matrices calibrated: on the calibration text their outputs change by {error:.2%}, with rounding to the nearest "
            f"by {nearest:.2%}; on other text the gain is smaller, the more so with few samples"
        )
    for name, zeros in list(report.dense.items())[:_SHOWN]:
        print(f"stays dense: {name} ({'its dtype has no compressed form' if zeros is None else f'{zeros:.1%} zeros'})")
    if len(report.dense) > _SHOWN:
        print(f"stay dense: {len(report.dense) - _SHOWN} more; --json names them")
    if report.negative_zeros:
        print(f"{report.negative_zeros:,} zeros lost their negative sign, which changes no product")
