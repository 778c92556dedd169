"""`maskllm quickstart`."""

from __future__ import annotations

import argparse

from maskllm.quickstart.pipeline import METHODS, QuickstartSettings, quickstart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    defaults = QuickstartSettings()
    parser.description = (
        f"Learn the 2:4 masks of a small model, from start to end, and compare them with {', '.join(METHODS)}. An interrupted run "
        "continues if the command is repeated: finished steps are skipped."
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="directory for all results")
    parser.add_argument("--model", metavar="DIR_OR_ID", help="Hugging Face model instead of SmolLM2-135M-Instruct")
    parser.add_argument(
        "--corpus",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="C4 shards to learn from, instead of installed documentation",
    )
    parser.add_argument(
        "--eval-corpus",
        metavar="FILE",
        help="text to evaluate on, instead of documentation (WikiText-2 raw, JSON lines, plain text)",
    )
    parser.add_argument("--train-iters", type=int, default=defaults.train_iters, help="steps of mask learning")
    parser.add_argument("--global-batch-size", type=int, default=defaults.global_batch_size, help="sequences in a step")
    parser.add_argument(
        "--seq-length", type=int, default=defaults.seq_length, help="tokens in a sequence, for training and calibration"
    )
    parser.add_argument("--lr", type=float, default=defaults.lr, help="learning rate of the logits at the start")
    parser.add_argument("--min-lr", type=float, default=defaults.min_lr, help="learning rate at the end")
    parser.add_argument(
        "--prior-strength", type=float, default=defaults.prior_strength, help="how far the prior mask moves the initial logits"
    )
    parser.add_argument(
        "--calibration-samples", type=int, default=defaults.calibration_samples, help="windows for Wanda and SparseGPT"
    )
    parser.add_argument("--eval-windows", type=int, default=defaults.eval_windows, help="windows of text to evaluate on")
    parser.add_argument("--eval-seq-length", type=int, default=defaults.eval_seq_length, help="tokens in an evaluation window")
    parser.add_argument("--processes", type=int, default=defaults.processes, help="training processes (ranks)")


def run(args: argparse.Namespace) -> None:
    """Run the pipeline and print the table."""
    names = QuickstartSettings.__dataclass_fields__.keys() & vars(args).keys()
    settings = QuickstartSettings(**{name: getattr(args, name) for name in names})
    quickstart(args.output, settings, model=args.model, corpus=args.corpus, eval_corpus=args.eval_corpus)
