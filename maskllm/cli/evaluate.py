"""`maskllm evaluate`: perplexity on held-out text."""

from __future__ import annotations

import argparse
import dataclasses
import os

import torch

from maskllm.cli.options import writable_file
from maskllm.dtypes import BY_FLAG
from maskllm.errors import MaskLLMError, flag
from maskllm.evaluation.huggingface import Evaluation, evaluate_hf
from maskllm.failures import run_guarded
from maskllm.files import write_json
from maskllm.processes import peak_resident_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR_OR_ID", help="Hugging Face checkpoint, directory or hub id")
    what.add_argument(
        "--load", metavar="CKPT", help="Megatron checkpoint of any stage; under torchrun its layers are split over all processes"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="held-out text: WikiText raw, JSON lines or plain text, each also as gzip or Zstandard",
    )
    parser.add_argument(
        "--mask",
        metavar="F.npz_OR_ID",
        help="mask file to apply to the weights of --model first, or the hub id of a repository that holds one",
    )
    parser.add_argument(
        "--mask-base", metavar="G.npz_OR_ID", help="if --mask is a difference: the mask file that it is a difference to"
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        required=True,
        metavar="S",
        help="tokens in a window; perplexity is exp of the mean, over all windows, of the S - 1 predictions in each",
    )
    parser.add_argument("--max-windows", type=int, metavar="N", help="evaluate the first N windows only")
    parser.add_argument(
        "--params-dtype",
        choices=sorted(BY_FLAG),
        help="dtype to compute in; default for --model: the checkpoint's dtype, or fp32 on CPUs without instructions for it; "
        "for --load: bf16 on GPUs, fp32 on CPUs",
    )
    parser.add_argument("--device", metavar="D", help="device for --model; default: cuda if there is one, else cpu")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow --model to run the code in its directory")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write the numbers as JSON")


def run(args: argparse.Namespace) -> int | None:
    """Evaluate and print the perplexity."""
    dtype = BY_FLAG[args.params_dtype] if args.params_dtype else None
    windows = {"seq_length": args.seq_length, "max_windows": args.max_windows}
    if args.model is not None:
        result = evaluate_hf(
            args.model,
            args.data,
            **windows,
            mask_file=args.mask,
            mask_base=args.mask_base,
            dtype=dtype,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
        report(args, result)
        return None
    for name in ("mask", "mask_base"):
        if getattr(args, name) is not None:
            raise MaskLLMError(f"{flag(name)}: applies to --model only; a Megatron checkpoint has its own masks")
    if args.device is not None or args.trust_remote_code:
        raise MaskLLMError("--device, --trust-remote-code: apply to --model only; leave them out with --load")
    import megatron_patches

    megatron_patches.import_megatron()
    from maskllm.evaluation.megatron import evaluate_checkpoint
    from maskllm.megatron.process_groups import run_in_group

    def evaluate() -> None:
        result = evaluate_checkpoint(args.load, args.data, **windows, params_dtype=dtype)
        if torch.distributed.get_rank() == 0:
            report(args, result)

    size = int(os.environ.get("WORLD_SIZE", "1"))
    return run_in_group(lambda: run_guarded("maskllm evaluate", evaluate), tensor_model_parallel_size=size)


def report(args: argparse.Namespace, result: Evaluation) -> None:
    """Print the result and, with --json, write it."""
    print(
        f"perplexity {result.perplexity:.4f} ({result.windows} windows of {result.seq_length} tokens, {result.data_kind}, "
        f"{result.text_tokens} tokens in all; {result.zeros:.1%} zeros; {result.dtype} on {result.device}, {result.seconds:.1f} s)"
    )
    if args.json:
        what = {"model": args.model, "load": args.load, "data": args.data, "mask": args.mask, "mask_base": args.mask_base}
        write_json(args.json, what | dataclasses.asdict(result) | {"peak_memory_bytes": peak_resident_bytes()})
