"""`maskllm doctor`."""

from __future__ import annotations

import argparse

from maskllm.cli.options import writable_file
from maskllm.environment.doctor import as_json, examine
from maskllm.errors import MaskLLMError
from maskllm.files import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.description = "Print what this installation has and what is missing. The exit status is 1 if training cannot run."
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="also write what was found to this file")


def run(args: argparse.Namespace) -> None:
    """Print the diagnosis. Raises MaskLLMError if training cannot run."""
    diagnosis = examine()
    print("\n".join(diagnosis.lines()), flush=True)
    if args.json:
        write_json(args.json, as_json(diagnosis))
    if diagnosis.problems:
        raise MaskLLMError(f"training cannot run: {'; '.join(diagnosis.problems)}")
    where = f"{len(diagnosis.found['gpus'])} GPUs (nccl)" if diagnosis.found["gpus"] else "the CPU (gloo)"
    print(f"training can run, on {where}")
