"""The options of the verbs that calibrate: which text, and how many windows of it."""

from __future__ import annotations

import argparse

import torch

from maskllm.errors import MaskLLMError, flag
from maskllm.pruning.calibration import Calibration

CALIBRATION_OPTIONS = {"calibration_samples": "samples", "seq_length": "seq_length", "seed": "seed", "pack": "pack"}
"""The options beside --calibration-data, and their fields of `Calibration`. An option that is not given is None."""


def add_calibration_options(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--calibration-data and what belongs to it; `purpose` ends the help of that option."""
    parser.add_argument(
        "--calibration-data", metavar="PREFIX_OR_FILE", help=f"prefix of an indexed dataset, or JSON-lines file; {purpose}"
    )
    parser.add_argument(
        "--calibration-samples", type=int, metavar="K", help=f"number of windows to draw (default: {Calibration.samples})"
    )
    parser.add_argument("--seq-length", type=int, metavar="S", help=f"tokens in a window (default: {Calibration.seq_length})")
    parser.add_argument("--seed", type=int, metavar="X", help=f"seed for the choice of windows (default: {Calibration.seed})")
    parser.add_argument("--pack", action="store_true", default=None, help="join documents into one stream before cutting windows")


def calibration_of(args: argparse.Namespace, params_dtype: torch.dtype | None) -> Calibration | None:
    """The calibration that the options describe; None without --calibration-data.

    Raises MaskLLMError for a wrong number, and for options of a calibration without --calibration-data.
    """
    given = {name: getattr(args, name) for name in CALIBRATION_OPTIONS if getattr(args, name) is not None}
    if args.calibration_data is None:
        for name in given:
            raise MaskLLMError(f"{flag(name)}: belongs to --calibration-data, which is not given")
        return None
    for name, value in given.items():
        if value < (0 if name == "seed" else 1):
            wanted = "a number of at least 0" if name == "seed" else "a positive number"
            raise MaskLLMError(f"{flag(name)} {value}: wanted {wanted}")
    fields = {CALIBRATION_OPTIONS[name]: value for name, value in given.items()}
    return Calibration(args.calibration_data, **fields, params_dtype=params_dtype)
