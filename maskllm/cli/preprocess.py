"""`maskllm preprocess`: JSON lines to a Megatron indexed dataset."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from maskllm.cli.options import positive_integer, writable_file
from maskllm.files import write_json
from maskllm.processes import peak_resident_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="FILE",
        help="JSON lines, plain, gzip or Zstandard, as C4's shards",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin and .idx; KEY is the value of --json-key"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_FILE",
        help="Hugging Face directory or tokenizer.json, or a SentencePiece tokenizer.model (BOS first, as Llama2Tokenizer); "
        "a tokenizer that adds BOS by itself adds it here too, as in Megatron-LM with --tokenizer-hf-include-special-tokens; "
        "tokenizer_config.json and the other files beside it count",
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-sequence token")
    parser.add_argument("--workers", type=positive_integer, metavar="N", help="tokenizing threads; default: one per core")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="key of the text in each line's JSON object")
    parser.add_argument(
        "--skip-bad-lines", action="store_true", help="count and report lines without a document instead of failing at the first"
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write the numbers as JSON")


def run(args: argparse.Namespace) -> None:
    """Tokenize, then print what was written and which lines were skipped."""
    from maskllm.data.preprocess import preprocess

    summary = preprocess(
        args.input,
        args.output_prefix,
        args.tokenizer,
        append_eod=args.append_eod,
        workers=args.workers,
        json_key=args.json_key,
        skip_bad_lines=args.skip_bad_lines,
    )
    for message in summary.bad_line_messages:
        print(f"maskllm preprocess: skipped {message}", file=sys.stderr)
    if summary.bad_lines > len(summary.bad_line_messages):
        print(f"maskllm preprocess: skipped {summary.bad_lines} lines in all", file=sys.stderr)
    for message in summary.warnings:
        print(f"maskllm preprocess: warning: {message}", file=sys.stderr)
    print(
        f"{summary.prefix}: {summary.documents} documents ({summary.empty_documents} empty, {summary.bad_lines} lines skipped), "
        f"{summary.tokens} tokens, {summary.input_bytes / 1e6 / summary.seconds:.1f} MB/s with {summary.library}"
    )
    if args.json:
        write_json(args.json, dataclasses.asdict(summary) | {"peak_memory_bytes": peak_resident_bytes()})
