"""`maskllm prune`."""

from __future__ import annotations

import argparse

from maskllm.patterns import Pattern
from maskllm.pruning.solve import PruneSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    defaults = PruneSettings()
    parser.add_argument("--load", required=True, metavar="CKPT", help="dense checkpoint: its directory or one iteration's")
    parser.add_argument("--output", required=True, metavar="CKPT", help="Megatron checkpoint directory to write")
    parser.add_argument("--method", choices=("magnitude",), default="magnitude", help="how the mask is chosen")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--pattern", default=str(defaults.sparsity), metavar="N:M", help="keep N of every M consecutive weights")
    target.add_argument("--sparsity", type=float, metavar="SHARE", help="remove this share of the weights wherever they are")


def run(args: argparse.Namespace) -> None:
    """Prune and say where to."""
    from maskllm.pruning.checkpoint import prune_by_magnitude

    sparsity = Pattern.parse(args.pattern) if args.sparsity is None else args.sparsity
    path = prune_by_magnitude(args.load, args.output, PruneSettings(args.method, sparsity))
    print(f"wrote {path}")
