"""`maskllm quickstart`."""

from __future__ import annotations

import argparse

from maskllm.quickstart.pipeline import METHODS, QuickstartSettings, quickstart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    defaults = QuickstartSettings()
    parser.description = (
        f"Make a small model 2:4 sparse, from start to end: learn its masks, compare them with {', '.join(METHODS)}, and train its weights "
        "too. An interrupted run continues if the command is repeated: finished steps are skipped."
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
    parser.add_argument("--train-iters", type=int, default=defaults.train_iters, help="steps of mask learning, the first training")
    parser.add_argument("--global-batch-size", type=int, default=defaults.global_batch_size, help="sequences in a step")
    parser.add_argument(
        "--seq-length", type=int, default=defaults.seq_length, help="tokens in a sequence, for training and calibration"
    )
    parser.add_argument("--lr", type=float, default=defaults.lr, help="learning rate of the logits at the start")
    parser.add_argument("--min-lr", type=float, default=defaults.min_lr, help="learning rate at the end")
    parser.add_argument(
        "--prior-strength", type=float, default=defaults.prior_strength, help="how far the prior mask moves the initial logits"
    )
    second = parser.add_argument_group("the second training, which starts from the learned masks")
    second.add_argument(
        "--weights-train",
        choices=["both", "weights"],
        default=defaults.weights_train,
        help="what it trains: weights and masks, or the weights under the learned masks",
    )
    second.add_argument("--weights-train-iters", type=int, default=defaults.weights_train_iters, help="its steps")
    second.add_argument("--weights-lr", type=float, default=defaults.weights_lr, help="learning rate of the weights at the start")
    second.add_argument(
        "--weights-min-lr", type=float, default=defaults.weights_min_lr, help="learning rate of the weights at the end"
    )
    second.add_argument(
        "--masks-lr", type=float, default=defaults.masks_lr, help="with both: learning rate of the logits at the start"
    )
    second.add_argument(
        "--masks-min-lr", type=float, default=defaults.masks_min_lr, help="with both: learning rate of the logits at the end"
    )
    second.add_argument(
        "--ce-loss-coeff", type=float, default=defaults.ce_loss_coeff, help="weight of the cross-entropy with the text"
    )
    second.add_argument(
        "--kl-loss-coeff",
        type=float,
        default=defaults.kl_loss_coeff,
        help="weight of the divergence from the dense model's predictions",
    )
    parser.add_argument(
        "--calibration-samples", type=int, default=defaults.calibration_samples, help="windows for Wanda and SparseGPT"
    )
    parser.add_argument("--eval-windows", type=int, default=defaults.eval_windows, help="windows of text to evaluate on")
    parser.add_argument("--eval-seq-length", type=int, default=defaults.eval_seq_length, help="tokens in an evaluation window")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text that the models continue in the report, instead of three given ones; repeat the option for several texts",
    )
    parser.add_argument("--processes", type=int, default=defaults.processes, help="training processes (ranks)")


def run(args: argparse.Namespace) -> None:
    """Run the pipeline and print the table."""
    names = QuickstartSettings.__dataclass_fields__.keys() & vars(args).keys()
    settings = QuickstartSettings(**{name: getattr(args, name) for name in names})
    quickstart(args.output, settings, model=args.model, corpus=args.corpus, eval_corpus=args.eval_corpus, prompts=args.prompt)
