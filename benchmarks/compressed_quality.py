"""Perplexity of a 2:4 model as `maskllm compress` stores it: 16, 8 and 4 bits, rounded to the nearest and calibrated.

    python -m benchmarks.compressed_quality --dense DIR --sparse DIR --calibration-data FILE --eval-data FILE --work DIR --row ROW
        [--json FILE]

A ROW is dense, 16, 8-nearest, 8-calibrated, 4-nearest or 4-calibrated. --sparse is compressed and evaluated with public commands; steps
that are done are skipped.

Windows of more than 64 tokens see rounded weights, but exact activations. Generating on CPUs rounds activations to 8 bits too, at 8 and 4
bits (docs/kernels.md). So these rows are evaluated a second time in chunks of --chunk tokens, through a key-value cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from maskllm.data.tokenizer import load_tokenizer
from maskllm.dtypes import BY_FLAG
from maskllm.evaluation.perplexity import WindowNLLs, next_token_nll, perplexity
from maskllm.evaluation.windows import read_windows
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_json
from maskllm.huggingface.loading import load_hf_model
from maskllm.quickstart.steps import Steps

ROWS = {
    "dense": [],
    "16": ["--bits", "16"],
    "8-nearest": ["--bits", "8"],
    "8-calibrated": ["--bits", "8", "--calibration-data"],
    "4-nearest": ["--bits", "4"],
    "4-calibrated": ["--bits", "4", "--calibration-data"],
}
"""The rows, with the options of `maskllm compress`."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the row; returns its numbers."""
    verb, name = [sys.executable, "-m", "maskllm"], arguments.row
    folder = arguments.work / name
    folder.mkdir(parents=True, exist_ok=True)
    steps, directory = Steps(folder), arguments.dense
    row: dict[str, Any] = {"row": name}
    if name != "dense":
        directory, report, options = folder / "hf", folder / "compress.json", ROWS[name]
        if options[-1] == "--calibration-data":
            options = [
                *options, arguments.calibration_data, "--calibration-samples", arguments.calibration_samples,
                "--seq-length", arguments.calibration_length, "--pack", "--params-dtype", arguments.params_dtype,
            ]  # fmt: skip
        compress = [*verb, "compress", "--model", arguments.sparse, "--output", directory, *options, "--json", report]
        steps.run("compress", directory, compress)
        found = read_json_object(report)
        row |= {key: found[key] for key in ("seconds", "peak_memory_bytes", "bytes", "bytes_before", "calibration")}
        row["matrix_bytes"] = found["compressed_bytes"] / found["dense_bytes"]
        for key in ("relative_error", "nearest_error"):
            errors = [matrix[key] for matrix in found["matrices"].values() if matrix.get(key) is not None]
            row[key] = sum(errors) / len(errors) if errors else None
    file, chunks = folder / "perplexity.json", folder / "chunks.json"
    evaluate = [
        *verb, "evaluate", "--model", directory, "--data", arguments.eval_data, "--seq-length", arguments.seq_length,
        "--max-windows", arguments.max_windows, "--params-dtype", arguments.params_dtype, "--json", file,
    ]  # fmt: skip
    steps.run("evaluate", file, evaluate)
    row |= {key: read_json_object(file)[key] for key in ("perplexity", "windows", "seq_length", "dtype")}
    if name[0] in "84":
        steps.run(f"evaluate chunks of {arguments.chunk}", chunks, write_chunked, directory, chunks, arguments)
        row |= read_json_object(chunks)
    return row


def write_chunked(directory: Path, file: Path, arguments: argparse.Namespace) -> None:
    """Evaluate a model on chunks of windows."""
    model = load_hf_model(directory, dtype=BY_FLAG[arguments.params_dtype], device=torch.device("cpu"))
    tokenizer = load_tokenizer(directory, use_gigatoken=False)
    windows = read_windows(arguments.eval_data, tokenizer, arguments.seq_length, max_windows=arguments.max_windows).windows
    found = perplexity(chunked_nlls(model, arguments.chunk), windows, 1)
    write_json(file, {"perplexity_in_chunks": found.perplexity, "chunk": arguments.chunk})


def chunked_nlls(model: PreTrainedModel, chunk: int) -> WindowNLLs:
    """The negative log-likelihoods of windows that the model reads `chunk` tokens at a time, through a key-value cache."""

    @torch.inference_mode()
    def window_nlls(windows: torch.Tensor) -> list[float]:
        cache = DynamicCache(config=model.config)
        logits = [model(part, past_key_values=cache, use_cache=True).logits for part in windows.split(chunk, dim=1)]
        return [next_token_nll(rows, tokens) for rows, tokens in zip(torch.cat(logits, 1), windows, strict=True)]

    return window_nlls


def main(argv: list[str] | None = None) -> None:
    """Make the row and print or write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True, metavar="DIR", help="dense model")
    parser.add_argument("--sparse", required=True, metavar="DIR", help="2:4 model to compress")
    parser.add_argument("--calibration-data", required=True, metavar="PREFIX_OR_FILE", help="text to calibrate on")
    parser.add_argument("--calibration-samples", type=int, default=16, metavar="K", help="(default: %(default)s)")
    parser.add_argument("--calibration-length", type=int, default=512, metavar="S", help="tokens of each (default: %(default)s)")
    parser.add_argument("--eval-data", required=True, metavar="FILE", help="held-out text")
    parser.add_argument("--seq-length", type=int, default=1024, metavar="S", help="tokens of a window (default: %(default)s)")
    parser.add_argument("--max-windows", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=64, metavar="N", help="tokens read at once (default: %(default)s)")
    parser.add_argument("--params-dtype", default="fp32", help="dtype to compute in (default: %(default)s)")
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="folder for checkpoints")
    parser.add_argument("--row", required=True, choices=ROWS, help="what to measure")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    arguments = parser.parse_args(argv)
    row = run(arguments)
    print(
        f"{arguments.row}: perplexity {row['perplexity']:.2f}, in chunks {row.get('perplexity_in_chunks', row['perplexity']):.2f}"
    )
    if arguments.json:
        write_json(arguments.json, row)


if __name__ == "__main__":
    sys.exit(run_guarded("compressed_quality", main))
