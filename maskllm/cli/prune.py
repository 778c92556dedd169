"""`maskllm prune`, in one process or under torchrun."""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from maskllm.cli.calibration_options import add_calibration_options, calibration_of
from maskllm.cli.measure import measured
from maskllm.cli.options import writable_file
from maskllm.dtypes import BY_FLAG, COMPUTE
from maskllm.environment.cpu_speed import slow_dtype_warning
from maskllm.errors import MaskLLMError, flag
from maskllm.failures import run_guarded
from maskllm.files import write_json
from maskllm.huggingface.mask_file import MaskFile, open_mask_file
from maskllm.patterns import Pattern
from maskllm.pruning.calibration import Calibration
from maskllm.pruning.megatron import prune_calibrated, prune_without_data
from maskllm.pruning.solve import MASK_FILE, METHODS, PruneSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    settings = PruneSettings()
    parser.add_argument("--load", required=True, metavar="CKPT", help="dense checkpoint: its directory or one iteration's")
    parser.add_argument("--output", required=True, metavar="CKPT", help="Megatron checkpoint directory to write")
    parser.add_argument("--method", choices=(*METHODS, MASK_FILE), default=settings.method, help="how to choose the mask")
    parser.add_argument(
        "--mask",
        metavar="F.npz_OR_ID",
        help=f"with --method {MASK_FILE}: the mask file, or the hub id of a repository that holds one",
    )
    parser.add_argument(
        "--mask-base", metavar="G.npz_OR_ID", help="if --mask is a difference: the mask file that it is a difference to"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--pattern", default=str(settings.sparsity), metavar="N:M", help="keep N of every M consecutive weights")
    target.add_argument(
        "--sparsity", type=float, metavar="SHARE", help="remove this share of the weights, in any places (unstructured)"
    )
    update = parser.add_mutually_exclusive_group()
    update.add_argument("--update-weights", action="store_true", help="store SparseGPT's updated weights")
    update.add_argument(
        "--least-squares",
        action="store_true",
        help="with any method: store the kept weights that bring each matrix's outputs closest to the dense matrix's",
    )
    parser.add_argument(
        "--no-sequential",
        action="store_true",
        help="calibrate every layer on the dense model's activations instead of the pruned layers'",
    )
    add_calibration_options(parser, "magnitude and mask-file do not need it, but report errors only with it")
    parser.add_argument("--params-dtype", choices=COMPUTE, default="bf16", help="dtype that the layers compute in")
    parser.add_argument(
        "--json",
        type=writable_file,
        metavar="FILE",
        help="write a report: time, memory and, with calibration data, the error of each layer and matrix",
    )


def run(args: argparse.Namespace) -> int:
    """Prune, then print the output directory."""
    from maskllm.megatron.process_groups import run_in_group

    logging.basicConfig(format="%(message)s")
    logging.getLogger("maskllm").setLevel(logging.INFO)
    sparsity = Pattern.parse(args.pattern) if args.sparsity is None else args.sparsity
    masks = _mask_file(args)
    settings = PruneSettings(
        args.method, sparsity, args.update_weights, args.least_squares, sequential=not args.no_sequential, mask_file=masks
    )
    calibration = calibration_of(args, BY_FLAG[args.params_dtype])
    if calibration is None:
        if args.method not in ("magnitude", MASK_FILE):
            raise MaskLLMError(f"--method {args.method} needs --calibration-data")
        if args.least_squares:
            raise MaskLLMError("--least-squares needs --calibration-data, whose outputs it fits")
        work = functools.partial(_without_data, args, settings)
    else:
        work = functools.partial(_with_data, args, settings, calibration)
    return run_in_group(lambda: run_guarded("maskllm prune", work), timeout_minutes=60)


def _mask_file(args: argparse.Namespace) -> MaskFile | None:
    """The mask file of --method mask-file. Raises MaskLLMError if the options do not go together or the file cannot be read."""
    if args.method != MASK_FILE:
        for name in ("mask", "mask_base"):
            if getattr(args, name) is not None:
                raise MaskLLMError(f"{flag(name)}: goes with --method {MASK_FILE} only, found --method {args.method}")
        return None
    if args.mask is None:
        raise MaskLLMError(f"--method {MASK_FILE} needs --mask F.npz, a mask file")
    if args.sparsity is not None:
        raise MaskLLMError(f"--sparsity: --method {MASK_FILE} wants the file's pattern, as --pattern N:M")
    if args.update_weights:
        raise MaskLLMError(
            f"--update-weights: --method {MASK_FILE} takes a mask only; SparseGPT's update needs --method sparsegpt, and "
            "--least-squares goes with any"
        )
    return open_mask_file(args.mask, args.mask_base)


def _without_data(args: argparse.Namespace, settings: PruneSettings) -> None:
    """Prune by magnitude, or as a mask file says, on the first rank; one process is enough."""
    from maskllm.distributed import raised_together

    with raised_together():
        if torch.distributed.get_rank() == 0:
            with measured() as cost:
                path = prune_without_data(args.load, args.output, settings)
            _report(args, path, {"load": args.load, **settings.as_dict()} | cost)


def _with_data(args: argparse.Namespace, settings: PruneSettings, calibration: Calibration) -> None:
    """Prune with calibration data on all ranks."""
    if torch.distributed.get_rank() == 0 and (slow := slow_dtype_warning(calibration.params_dtype)):
        print(f"maskllm prune: {slow}", file=sys.stderr)
    with measured() as cost:
        path, report = prune_calibrated(args.load, args.output, settings, calibration)
    if torch.distributed.get_rank() == 0:
        _report(args, path, report | cost)


def _report(args: argparse.Namespace, path: Path, report: dict[str, Any]) -> None:
    if args.json is not None:
        write_json(args.json, report)
    print(f"wrote {path}")
