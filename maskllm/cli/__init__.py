"""The console command `maskllm VERB`.

Each verb is a module of this package with `add_arguments(parser)` and `run(args)`. `run` may return an exit status. A verb parses
its options, calls another room and prints the result. Only the module of the verb in use is imported, so `maskllm --help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from maskllm import __version__
from maskllm.cli.options import HelpFormatter, refuse_collisions, refuse_empty
from maskllm.failures import run_guarded, usage_said_once

VERBS = {
    "doctor": "what is installed here, what is missing, and whether training can run",
    "quickstart": "the whole pipeline on a small model, with a report",
    "preprocess": "JSON lines to a Megatron indexed dataset",
    "convert": "Hugging Face checkpoint to Megatron checkpoint",
    "prune": "add a one-shot mask to a Megatron checkpoint",
    "plan": "memory, time and disk that a training will take, and the layouts that fit",
    "finetune": "any transformers model for a task: prune, train and measure it, with a report",
    "trim": "keep only the winning mask of a trained checkpoint",
    "export": "Megatron checkpoint to Hugging Face checkpoint and mask file",
    "verify": "whether the weights of a Hugging Face checkpoint are what is said of them",
    "compress": "sparse Hugging Face checkpoint to one that stores only the non-zeros, and back",
    "evaluate": "perplexity and zero-shot tasks of Hugging Face models or a Megatron checkpoint",
    "generate": "text from a Hugging Face model",
    "benchmark": "speed and memory of Hugging Face models that generate text",
}

WITHOUT_MEGATRON = ("doctor", "finetune", "verify", "compress", "evaluate", "generate", "benchmark")
"""Verbs that run without Megatron Core. `doctor` reports if it is missing. `evaluate` imports it for --load only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `maskllm VERB ...`; returns the exit status: 0 done, 1 bad input, 2 bad usage, 75 stopped by SIGTERM, 130 interrupted.

    For `verify`, 1 means that something is not as claimed, and 2 also bad input.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a path it cannot encode must not fail the verb
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv[0] if argv and argv[0] in VERBS else None
    return run_guarded(f"maskllm {verb}" if verb else "maskllm", lambda: _run(verb, argv))


def _run(verb: str | None, argv: list[str]) -> int | None:
    """Parse and call. `verb` is the first word of `argv` if that is a verb; for None the parser reports the usage error."""
    parser = argparse.ArgumentParser(prog="maskllm", description="Learn N:M sparse masks for language models.")
    parser.add_argument("--version", action="version", version=f"maskllm {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, summary in VERBS.items():
        command = commands.add_parser(name, help=summary, description=summary, formatter_class=HelpFormatter, allow_abbrev=False)
        if name == verb:
            if verb not in WITHOUT_MEGATRON:
                importlib.import_module("megatron_patches").import_megatron()
            importlib.import_module(f"maskllm.cli.{name}").add_arguments(command)
    with usage_said_once():
        args = parser.parse_args(argv)
    refuse_empty(vars(args))
    refuse_collisions(vars(args))
    return importlib.import_module(f"maskllm.cli.{args.verb}").run(args)
