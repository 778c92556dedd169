"""The options of the verbs that run a Hugging Face model: in which dtype and on which device."""

from __future__ import annotations

import argparse

import torch

from maskllm.dtypes import BY_FLAG


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """--params-dtype and --device of a verb that runs a Hugging Face model; `dtype_of` gives the dtype."""
    parser.add_argument(
        "--params-dtype",
        choices=sorted(BY_FLAG),
        help="dtype to compute in; default: the checkpoint's dtype, or fp32 on CPUs without instructions for it",
    )
    parser.add_argument("--device", metavar="D", help="device to compute on; default: cuda if there is one, else cpu")


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype that --params-dtype names, or None without it."""
    return BY_FLAG[args.params_dtype] if args.params_dtype else None
