"""`maskllm evaluate`: perplexity on held-out text."""

from __future__ import annotations

import argparse
import dataclasses

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="Hugging Face checkpoint, directory or hub id")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="held-out text: WikiText raw, JSON lines (.json, .jsonl, .gz), or plain text"
    )
    parser.add_argument("--mask", metavar="F.npz", help="mask file to apply to the model's weights first")
    parser.add_argument("--seq-length", type=int, required=True, metavar="S", help="tokens in a window")
    parser.add_argument("--max-windows", type=int, metavar="N", help="evaluate the first N windows only")
    parser.add_argument(
        "--params-dtype",
        choices=sorted(DTYPES),
        help="what to compute in; default: the checkpoint's type, fp32 on CPUs without instructions for it",
    )
    parser.add_argument("--device", metavar="D", help="default: cuda if there is one, else cpu")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model run code that it brings along")
    parser.add_argument("--json", metavar="F", help="write the numbers as JSON")


def run(args: argparse.Namespace) -> None:
    """Evaluate and print the perplexity."""
    import torch

    from maskllm.evaluation.huggingface import evaluate_hf
    from maskllm.files import write_json

    result = evaluate_hf(
        args.model,
        args.data,
        seq_length=args.seq_length,
        max_windows=args.max_windows,
        mask_file=args.mask,
        dtype=getattr(torch, DTYPES[args.params_dtype]) if args.params_dtype else None,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    print(
        f"perplexity {result.perplexity:.4f} ({result.windows} windows of {result.seq_length} tokens, {result.data_kind}, "
        f"{result.text_tokens} tokens in all; {result.zeros:.1%} zeros; {result.dtype} on {result.device}, {result.seconds:.1f} s)"
    )
    if args.json:
        write_json(args.json, {"model": args.model, "data": args.data, "mask": args.mask, **dataclasses.asdict(result)})
