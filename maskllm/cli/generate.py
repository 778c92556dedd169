"""`maskllm generate`: text from a Hugging Face model."""

from __future__ import annotations

import argparse
import dataclasses

from maskllm.cli.compute_options import add_compute_options, dtype_of
from maskllm.cli.options import positive_integer, writable_file
from maskllm.dtypes import dtype_name
from maskllm.environment.memory import peak_memory_bytes
from maskllm.files import write_json
from maskllm.inference.generation import TextGenerator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.description = (
        "Continue prompts greedily: each token is the model's most probable one. A prompt is plain text to continue, for chat models too: "
        "no chat template is applied."
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="Hugging Face checkpoint, directory or hub id")
    parser.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT", help="text to continue; repeat the option for several texts"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_integer,
        default=64,
        metavar="N",
        help="tokens to add; the text ends earlier if the model ends it, or where the model's context ends",
    )
    parser.add_argument("--stream", action="store_true", help="print the text while it comes")
    add_compute_options(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow --model to run the code in its directory")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write prompts and texts as JSON")


def run(args: argparse.Namespace) -> None:
    """Print each prompt with its continuation, and an empty line between two of them."""
    generator = TextGenerator(
        args.model,
        dtype=dtype_of(args),
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    continuations = []
    for number, prompt in enumerate(args.prompt):
        if number:
            print()
        found = generator.continue_text(prompt, args.max_new_tokens, stream=args.stream)
        if not args.stream:
            print(found.prompt + found.text, flush=True)
        continuations.append(dataclasses.asdict(found))
    if args.json:
        values = {
            "model": args.model,
            "max_new_tokens": args.max_new_tokens,
            "dtype": dtype_name(generator.model.dtype),
            "device": str(generator.model.device),
            "continuations": continuations,
            "peak_memory_bytes": peak_memory_bytes(generator.model.device),
        }
        write_json(args.json, values)
