"""Perplexity of a 2:4 model as `maskllm compress` stores it: 16, 8 and 4 bits, rounded to the nearest and calibrated.

    python benchmarks/compressed_quality.py run --sparse DIR [--dense DIR] --calibration-data FILE --eval-data FILE --work DIR
    python benchmarks/compressed_quality.py table

`run` compresses --sparse, a Hugging Face directory, in five ways and evaluates each with public commands; finished steps are skipped.
Windows of more than 64 tokens see rounded weights and exact activations. Generating sees activations that are rounded to 8 bits, on
CPUs, at 8 and 4 bits (docs/kernels.md). So each of those directories is evaluated a second time in chunks of --chunk tokens through
a key-value cache, with the operators that generating uses. Each row is a JSON file in docs/benchmarks/compressed_quality. `table` prints
all of them as a Markdown table; docs/compressed-format.md holds it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from machine import describe
from transformers import DynamicCache, PreTrainedModel

import maskllm
from maskllm.data.tokenizer import load_tokenizer
from maskllm.dtypes import BY_FLAG
from maskllm.environment.revision import commit
from maskllm.evaluation.perplexity import WindowNLLs, next_token_nll, perplexity
from maskllm.evaluation.windows import read_windows
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_json
from maskllm.huggingface.loading import load_hf_model
from maskllm.quickstart.steps import Steps

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks" / "compressed_quality"
WAYS = {
    "16": ["--bits", "16"],
    "8 nearest": ["--bits", "8"],
    "8 calibrated": ["--bits", "8", "--calibration-data"],
    "4 nearest": ["--bits", "4"],
    "4 calibrated": ["--bits", "4", "--calibration-data"],
}


def run(arguments: argparse.Namespace) -> None:
    """Make the rows and write their results."""
    verb = [sys.executable, "-m", "maskllm"]
    calibration = [
        arguments.calibration_data, "--calibration-samples", arguments.calibration_samples, "--seq-length", arguments.calibration_length,
        "--pack", "--params-dtype", arguments.params_dtype,
    ]  # fmt: skip
    evaluation = [
        "--data", arguments.eval_data, "--seq-length", arguments.seq_length, "--max-windows", arguments.max_windows,
        "--params-dtype", arguments.params_dtype,
    ]  # fmt: skip
    for name in arguments.rows or ["dense", *WAYS]:
        if name == "dense" and arguments.dense is None:
            continue
        folder = arguments.work / name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        steps, directory, command = Steps(folder), arguments.dense, []
        row: dict[str, Any] = {"row": name}
        if name != "dense":
            directory, report = folder / "hf", folder / "compress.json"
            options = WAYS[name] + (calibration if WAYS[name][-1] == "--calibration-data" else [])
            command = ["compress", "--model", arguments.sparse, "--output", directory, *options, "--json", report]
            steps.run("compress", directory, [*verb, *command])
            found = read_json_object(report)
            row |= {key: found[key] for key in ("seconds", "peak_memory_bytes", "bytes", "bytes_before", "calibration")}
            row |= {"matrices": len(found["matrices"]), "matrix_bytes": found["compressed_bytes"] / found["dense_bytes"]}
        file = folder / "perplexity.json"
        steps.run("evaluate", file, [*verb, "evaluate", "--model", directory, *evaluation, "--json", file])
        row |= {key: read_json_object(file)[key] for key in ("perplexity", "windows", "seq_length", "data", "dtype")}
        if name[:2] in ("8 ", "4 "):
            file = folder / "chunks.json"
            steps.run(f"evaluate chunks of {arguments.chunk}", file, write_chunked, directory, file, arguments)
            row["in_chunks"] = read_json_object(file)
        row |= {
            "command": shlex.join(map(str, ["maskllm", *command])) if command else None,
            "machine": describe("cpu"),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "versions": {"maskllm": maskllm.__version__}
            | {package: metadata.version(package) for package in ("torch", "transformers")},
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS / f"{name.replace(' ', '-')}.json", row)


def write_chunked(directory: Path, file: Path, arguments: argparse.Namespace) -> None:
    """Evaluate a model on chunks of windows."""
    model = load_hf_model(directory, dtype=BY_FLAG[arguments.params_dtype], device=torch.device("cpu"))
    tokenizer = load_tokenizer(directory, use_gigatoken=False)
    windows = read_windows(arguments.eval_data, tokenizer, arguments.seq_length, max_windows=arguments.max_windows).windows
    found = perplexity(chunked_nlls(model, arguments.chunk), windows, 1)
    write_json(file, {"perplexity": found.perplexity, "chunk": arguments.chunk, "seconds": found.seconds})


def chunked_nlls(model: PreTrainedModel, chunk: int) -> WindowNLLs:
    """The negative log-likelihoods of windows that the model reads `chunk` tokens at a time, through a key-value cache."""

    @torch.inference_mode()
    def window_nlls(windows: torch.Tensor) -> list[float]:
        cache = DynamicCache(config=model.config)
        logits = [model(part, past_key_values=cache, use_cache=True).logits for part in windows.split(chunk, dim=1)]
        return [next_token_nll(rows, tokens) for rows, tokens in zip(torch.cat(logits, 1), windows, strict=True)]

    return window_nlls


def table() -> str:
    """All results as a Markdown table."""
    results = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("*.json")}
    lines = [
        "| weights | bytes of the blocks' matrices | perplexity | generating | minutes to compress |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ["dense", *(name.replace(" ", "-") for name in WAYS)]:
        if name not in results:
            continue
        row = results[name]
        bits, *how = row["row"].split()
        kind = {"nearest": ", rounded to the nearest", "calibrated": ", calibrated"}[how[0]] if how else ""
        cells = [
            "dense" if bits == "dense" else f"2:4, {bits} bits{kind}",
            f"{row['matrix_bytes']:.3f}" if "matrix_bytes" in row else "1",
            f"{row['perplexity']:.2f}",
            f"{row['in_chunks']['perplexity']:.2f}" if "in_chunks" in row else "the same",
            f"{row['seconds'] / 60:.1f}" if "seconds" in row else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("table", help="print the results as a Markdown table")
    verb = verbs.add_parser("run", help="make rows")
    verb.add_argument("--sparse", required=True, metavar="DIR", help="2:4 model to compress")
    verb.add_argument("--dense", metavar="DIR", help="dense model, for the first row")
    verb.add_argument("--calibration-data", required=True, metavar="PREFIX_OR_FILE")
    verb.add_argument("--calibration-samples", type=int, default=16, metavar="K", help="(default: %(default)s)")
    verb.add_argument("--calibration-length", type=int, default=512, metavar="S", help="tokens of each (default: %(default)s)")
    verb.add_argument("--eval-data", required=True, metavar="FILE", help="held-out text")
    verb.add_argument("--seq-length", type=int, default=1024, metavar="S", help="tokens of a window (default: %(default)s)")
    verb.add_argument("--max-windows", type=int, default=20, metavar="N", help="(default: %(default)s)")
    verb.add_argument("--chunk", type=int, default=64, metavar="N", help="tokens read at once (default: %(default)s)")
    verb.add_argument("--params-dtype", default="fp32", help="dtype to compute in (default: %(default)s)")
    verb.add_argument("--work", required=True, type=Path, metavar="DIR", help="folder for checkpoints")
    verb.add_argument("rows", nargs="*", choices=["dense", *WAYS], metavar="ROW", help=f"default: dense, {', '.join(WAYS)}")
    return parser.parse_args(argv)


def main() -> None:
    """Run the rows, or print the table."""
    arguments = parse_arguments()
    if arguments.verb == "table":
        print(table())
    else:
        run(arguments)


if __name__ == "__main__":
    sys.exit(run_guarded("compressed_quality", main))
