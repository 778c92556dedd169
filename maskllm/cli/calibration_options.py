"""The options of the verbs that calibrate: which text, and how many windows of it."""

from __future__ import annotations

import argparse

import torch

from maskllm.errors import MaskLLMError, flag
from maskllm.pruning.calibration import Calibration


def add_calibration_options(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--calibration-data and what belongs to it; `purpose` ends the help of that option."""
    parser.add_argument(
        "--calibration-data", metavar="PREFIX_OR_FILE", help=f"prefix of an indexed dataset, or JSON-lines file; {purpose}"
    )
    parser.add_argument(
        "--calibration-samples", type=int, default=Calibration.samples, metavar="K", help="number of windows to draw"
    )
    parser.add_argument("--seq-length", type=int, default=Calibration.seq_length, metavar="S", help="tokens in a window")
    parser.add_argument("--seed", type=int, default=Calibration.seed, metavar="X", help="seed for the choice of windows")
    parser.add_argument("--pack", action="store_true", help="join documents into one stream before cutting windows")


def calibration_of(args: argparse.Namespace, params_dtype: torch.dtype | None) -> Calibration | None:
    """The calibration that the options describe; None without --calibration-data. Raises MaskLLMError for a wrong number."""
    for name in ("calibration_samples", "seq_length"):
        if getattr(args, name) < 1:
            raise MaskLLMError(f"{flag(name)} {getattr(args, name)}: wanted a positive number")
    if args.seed < 0:
        raise MaskLLMError(f"--seed {args.seed}: wanted a number of at least 0")
    if args.calibration_data is None:
        return None
    return Calibration(args.calibration_data, args.calibration_samples, args.seq_length, args.seed, args.pack, params_dtype)
