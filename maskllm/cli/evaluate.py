"""`maskllm evaluate`: perplexity on held-out text, and zero-shot tasks."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from maskllm.cli.compute_options import dtype_of
from maskllm.cli.options import positive_integer, writable_file
from maskllm.dtypes import BY_FLAG
from maskllm.environment.optional_parts import lm_eval
from maskllm.environment.revision import running_code
from maskllm.errors import MaskLLMError, flag
from maskllm.evaluation.candidates import Candidate, named
from maskllm.evaluation.huggingface import Evaluation, evaluate_hf
from maskllm.evaluation.text import FORMATS
from maskllm.failures import is_alone, run_guarded
from maskllm.files import write_json
from maskllm.processes import peak_resident_bytes

_Code = dict[str, str | None]
PACKAGES = ("torch", "transformers", "tokenizers")
"""What computes a perplexity."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        action="append",
        metavar="DIR_OR_ID",
        help="Hugging Face checkpoint, directory or hub id; repeat it to compare models with the first one",
    )
    what.add_argument(
        "--load",
        metavar="CKPT",
        help="Megatron checkpoint of any stage; under torchrun its layers are split over all processes (for --data only)",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="held-out text: WikiText raw, JSON lines or plain text, each also as gzip or Zstandard"
    )
    parser.add_argument(
        "--data-format",
        choices=FORMATS,
        help="how --data is read and cut into windows. auto: by its contents; c4: 256 windows of random documents of C4's validation set "
        "(GPTQ); c4-new: the first 256 windows of its first 1100 documents (SparseGPT, Wanda); ptb: the rows of Penn Treebank's raw text, "
        "joined by spaces; default: auto",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help="zero-shot tasks: maskllm7, wanda7, all9, mmlu_5shot, or any task, group or tag of lm-eval",
    )
    parser.add_argument(
        "--mask",
        action=_OfModel,
        metavar="F.npz_OR_ID",
        help="mask file to apply to the weights of --model first, or the hub id of a repository that holds one; with several models, "
        "it belongs to the --model before it",
    )
    parser.add_argument(
        "--mask-base",
        action=_OfModel,
        metavar="G.npz_OR_ID",
        help="if --mask is a difference: the mask file that it is a difference to",
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="S",
        help="tokens in a window of --data; perplexity is exp of the mean, over all windows, of the S - 1 predictions in each",
    )
    parser.add_argument("--max-windows", type=int, metavar="N", help="evaluate the first N windows of --data only")
    parser.add_argument(
        "--tasks-data",
        metavar="DIR",
        help="folder with the tasks' data as JSON lines, NAME.jsonl; default: the hub, or its cache here",
    )
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="evaluate the first N items of each task only")
    parser.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N|auto",
        help="prompts of --tasks, or windows of --data with --model, in a batch; auto: as many as fit into memory; default: auto on GPUs, "
        "on CPUs 8 prompts or 1 window",
    )
    parser.add_argument(
        "--params-dtype",
        choices=sorted(BY_FLAG),
        help="dtype to compute in; default for --model: the checkpoint's dtype, or fp32 on CPUs without instructions for it; "
        "for --load: bf16 on GPUs, fp32 on CPUs",
    )
    parser.add_argument("--device", metavar="D", help="device for --model; default: cuda if there is one, else cpu")
    parser.add_argument("--trust-remote-code", action="store_true", help="allow --model to run the code in its directory")
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write the numbers as JSON")


class _OfModel(argparse.Action):
    """Appends the value to DEST, and to DEST_places the place in `model` of the --model before it, -1 for none."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        places = getattr(namespace, f"{self.dest}_places", [])
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])
        setattr(namespace, f"{self.dest}_places", [*places, len(namespace.model or []) - 1])


def _batch_size(text: str) -> int | str:
    """An argparse type: a positive integer or "auto"."""
    return text if text == "auto" else positive_integer(text)


def run(args: argparse.Namespace) -> int | None:
    """Evaluate and print the perplexity, the tasks' table, or both."""
    _check(args)
    code = running_code(PACKAGES)
    if args.load is None:
        return _evaluate_models(args, _named_models(args), code)
    import megatron_patches

    megatron_patches.import_megatron()
    from maskllm.evaluation.megatron import exported

    if args.tasks is None:
        return _evaluate_checkpoint(args, lambda result: _report(args, result, code))
    found: list[Evaluation] = []
    if args.data is not None and (status := _evaluate_checkpoint(args, found.append)):
        return status
    with exported(args.load) as candidate:
        return _report_models(args, [candidate], found, code)


def _check(args: argparse.Namespace) -> None:
    """Raise MaskLLMError for options that do not fit together, before any work."""
    if args.data is None and args.tasks is None:
        raise MaskLLMError("found neither --data nor --tasks; wanted a text for the perplexity, zero-shot tasks, or both")
    if (args.data is None) != (args.seq_length is None):
        found, missing = ("--data", "--seq-length") if args.seq_length is None else ("--seq-length", "--data")
        raise MaskLLMError(f"{found}: wanted {missing} too; the perplexity of a text is that of its windows of --seq-length tokens")
    if args.data is None and (args.max_windows is not None or args.data_format is not None):
        raise MaskLLMError("--max-windows, --data-format: apply to --data only")
    if args.tasks is None and (args.tasks_data is not None or args.limit is not None):
        raise MaskLLMError("--tasks-data, --limit: apply to --tasks only")
    if args.load is not None and args.tasks is None and args.batch_size is not None:
        raise MaskLLMError("--batch-size: applies to --model and --tasks only; a Megatron checkpoint takes a window at a time")
    for name in ("mask", "mask_base"):
        if args.load is not None and getattr(args, name) is not None:
            raise MaskLLMError(f"{flag(name)}: applies to --model only; a Megatron checkpoint has its own masks")
    if args.load is not None and args.tasks is None and (args.device is not None or args.trust_remote_code):
        raise MaskLLMError("--device, --trust-remote-code: apply to --model only; leave them out with --load")
    if args.tasks is not None and lm_eval().problem is not None:
        raise MaskLLMError(f"--tasks: lm-eval is {lm_eval().problem}; run `pip install 'maskllm[eval]'`")
    if args.tasks is not None and not is_alone():
        raise MaskLLMError("--tasks: runs in one process; start it without torchrun")


def _named_models(args: argparse.Namespace) -> list[Candidate]:
    """The models of the command line, each with its mask file."""
    return named(args.model, _of_models(args, "mask"), _of_models(args, "mask_base"))


def _of_models(args: argparse.Namespace, name: str) -> dict[int, str]:
    """Place in `model` -> the value of an option that belongs to that model. One model's options may stand before it."""
    found: dict[int, str] = {}
    for value, place in zip(getattr(args, name) or [], getattr(args, f"{name}_places", []), strict=True):
        place = 0 if len(args.model) == 1 else place
        if place < 0:
            raise MaskLLMError(
                f"{flag(name)} {value}: stands before every --model; with several models, put it after the one that it belongs to"
            )
        if place in found:
            raise MaskLLMError(f"{flag(name)} {value}: --model {args.model[place]} has {found[place]} already")
        found[place] = value
    return found


def _evaluate_models(args: argparse.Namespace, models: Sequence[Candidate], code: _Code) -> None:
    if args.data is None:
        return _report_models(args, models, [], code)
    found = [
        evaluate_hf(
            candidate.model,
            args.data,
            seq_length=args.seq_length,
            max_windows=args.max_windows,
            data_format=args.data_format or "auto",
            batch_size=args.batch_size,
            mask_file=candidate.mask,
            mask_base=candidate.mask_base,
            dtype=dtype_of(args),
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
        for candidate in models
    ]
    if args.tasks is None and len(models) == 1:
        return _report(args, found[0], code)
    return _report_models(args, models, found, code)


def _evaluate_checkpoint(args: argparse.Namespace, take: Callable[[Evaluation], None]) -> int | None:
    """The perplexity of a Megatron checkpoint, which rank 0 gives to `take`."""
    from maskllm.evaluation.megatron import evaluate_checkpoint
    from maskllm.megatron.process_groups import run_in_group

    def evaluate() -> None:
        result = evaluate_checkpoint(
            args.load,
            args.data,
            seq_length=args.seq_length,
            max_windows=args.max_windows,
            data_format=args.data_format or "auto",
            params_dtype=dtype_of(args),
        )
        if torch.distributed.get_rank() == 0:
            take(result)

    size = int(os.environ.get("WORLD_SIZE", "1"))
    return run_in_group(lambda: run_guarded("maskllm evaluate", evaluate), tensor_model_parallel_size=size)


def _report_models(args: argparse.Namespace, models: Sequence[Candidate], perplexities: Sequence[Evaluation], code: _Code) -> None:
    """Print the models' perplexities and the table of --tasks and, with --json, write them."""
    for candidate, result in zip(models, perplexities, strict=bool(perplexities)):
        print(f"{candidate.label}: {_line(result)}", flush=True)
    values: dict[str, Any] = {"data": args.data, "tasks": args.tasks, "tasks_data": args.tasks_data, "versions": code}
    if args.tasks is None:
        values["models"] = [
            {name: getattr(candidate, name) for name in ("label", "model", "mask", "mask_base")} for candidate in models
        ]
        return _write(args, values, perplexities)
    from maskllm.evaluation.side_by_side import zero_shot_report

    with zero_shot_report(
        models,
        args.tasks,
        data=args.tasks_data,
        limit=args.limit,
        batch_size=args.batch_size,
        dtype=dtype_of(args),
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    ) as found:
        print("\n".join(found.lines()), flush=True)
        return _write(args, values | found.as_json(), perplexities)


def _write(args: argparse.Namespace, values: dict[str, Any], perplexities: Sequence[Evaluation]) -> None:
    for model, result in zip(values["models"], perplexities, strict=bool(perplexities)):
        model["perplexity"] = dataclasses.asdict(result)
    if args.json:
        write_json(args.json, values | {"peak_memory_bytes": peak_resident_bytes()})


def _report(args: argparse.Namespace, result: Evaluation, code: _Code) -> None:
    """Print one model's perplexity and, with --json, write it."""
    print(_line(result))
    if args.json:
        model, mask, base = ((values or [None])[0] for values in (args.model, args.mask, args.mask_base))
        what = {"model": model, "load": args.load, "data": args.data, "mask": mask, "mask_base": base}
        write_json(args.json, what | dataclasses.asdict(result) | {"versions": code, "peak_memory_bytes": peak_resident_bytes()})


def _line(result: Evaluation) -> str:
    weights = f"weights {result.weights_sha256[:16]}; " if result.weights_sha256 else ""
    masks = f"masks {result.mask_sha256[:16]}; " if result.mask_sha256 else ""
    return (
        f"perplexity {result.perplexity:.4f} ({result.windows} windows of {result.seq_length} tokens, {result.data_kind}, "
        f"{result.text_tokens} tokens in all; {result.zeros:.1%} zeros; {weights}{masks}"
        f"{result.dtype} on {result.device}, {result.seconds:.1f} s)"
    )
