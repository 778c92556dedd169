"""The quality of every way to train, at equal training tokens: perplexity and zero-shot accuracy of the exported models.

    python benchmarks/quality.py run --hf DIR --train-data FILE... --eval-data FILE [--tasks-data DIR] --work DIR ROW...
    python benchmarks/quality.py table

A ROW is `RECIPE`, `RECIPE:RATE` or `RECIPE:RATE:SEED`, such as `weights-kl:6e-4:1`. `run` makes the one-shot masks, trains the row's
recipe from them, trims, exports and evaluates, all with public commands. Steps that are done are skipped, and an interrupted training
goes on. Each finished row is a JSON file in docs/benchmarks/quality. `table` prints all of them as a Markdown table; docs/quality.md
holds it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from machine import describe

from maskllm.environment.revision import commit
from maskllm.errors import MaskLLMError
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_json
from maskllm.quickstart.steps import Steps

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "benchmarks" / "quality"
ONE_SHOT = ("magnitude", "wanda", "sparsegpt")
PRIOR = "sparsegpt"
"""The one-shot mask that training starts from."""
CALIBRATION = ["--calibration-samples", "16", "--seq-length", "512", "--pack"]
EVALUATION = ["--seq-length", "1024", "--max-windows", "20"]
SEQ_LENGTH, BATCH = 512, 2
CE_KL = ["--ce-loss-coeff", "0.67", "--kl-loss-coeff", "0.33"]
KL = ["--ce-loss-coeff", "0", "--kl-loss-coeff", "1"]
MASKS = ["--prior-strength", "5"]


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    options: list[str]
    """Options of `maskllm.train`."""
    rates: tuple[str, ...]
    """Learning rates to try: of the logits with `--train masks`, else of the weights."""
    start: str = PRIOR

    def command(self, rate: str, seed: int, iterations: int) -> list[str]:
        """The options with this learning rate, which decays to a tenth, this seed and this length."""
        prefix = "--" if self.options[:2] == ["--train", "masks"] else "--weights-"
        return [
            *self.options, f"{prefix}lr", rate, f"{prefix}min-lr", f"{float(rate) / 10:g}", "--seed", str(seed),
            "--train-iters", str(iterations),
        ]  # fmt: skip


LOGITS_RATE = ["--lr", "5e-4", "--min-lr", "5e-5"]
RECIPES = {
    "masks": Recipe(["--train", "masks", *MASKS], ("5e-4", "1e-3", "2e-3")),
    "weights-ce": Recipe(["--train", "weights"], ("2e-4", "6e-4", "1e-3")),
    "weights-kl": Recipe(["--train", "weights", *KL], ("2e-4", "6e-4", "1e-3")),
    "weights-squarehead": Recipe(["--train", "weights", "--squarehead-loss-coeff", "1"], ("2e-4", "6e-4", "1e-3")),
    "weights-ce-kl": Recipe(["--train", "weights", *CE_KL], ("2e-4", "6e-4", "1e-3")),
    "both-ce-kl": Recipe(["--train", "both", *CE_KL, *MASKS, *LOGITS_RATE], ("2e-4", "6e-4", "1e-3")),
    "cast": Recipe(
        ["--train", "weights", "--weights-optimizer", "cast", "--pattern", "2:4", *CE_KL, "--lr-warmup-iters", "10"],
        ("3e-4", "1e-3", "2e-3"),
        start="dense",
    ),
    "both-kl": Recipe(["--train", "both", *KL, *MASKS, *LOGITS_RATE], ("2e-4", "6e-4", "1e-3")),
}


def run(arguments: argparse.Namespace) -> None:
    """Make the rows and write their results."""
    for row in arguments.rows:
        recipe, rate, seed = _parse(row)
        _run_row(arguments, recipe, rate, seed)


def _parse(row: str) -> tuple[str, str | None, int]:
    recipe, *rest = row.split(":")
    if recipe == "dense" or recipe in ONE_SHOT:
        return recipe, None, 0
    if recipe not in RECIPES:
        raise MaskLLMError(f"{row}: wanted dense, {', '.join(ONE_SHOT)}, {', '.join(RECIPES)}")
    return recipe, rest[0] if rest else RECIPES[recipe].rates[1], int(rest[1]) if len(rest) > 1 else 1234


def _run_row(arguments: argparse.Namespace, name: str, rate: str | None, seed: int) -> None:
    work: Path = arguments.work
    maskllm = [sys.executable, "-m", "maskllm"]
    megatron, prefix = work / "megatron", work / "data" / "train"
    dataset = f"{prefix}_text_document"
    iterations = max(1, round(arguments.tokens / (SEQ_LENGTH * BATCH)))
    row = name if rate is None else f"{name},lr={rate},seed={seed},tokens={iterations * SEQ_LENGTH * BATCH}"
    start = RECIPES[name].start if name in RECIPES else name

    common = Steps(_made(work / "common"))
    common.run(
        "preprocess", prefix.parent,
        [*maskllm, "preprocess", "--input", *arguments.train_data, "--output-prefix", prefix, "--tokenizer", arguments.hf, "--append-eod"],
    )  # fmt: skip
    common.run("convert", megatron / "dense", [*maskllm, "convert", "--hf", arguments.hf, "--output", megatron / "dense"])
    if start in ONE_SHOT:
        one_shot = Steps(_made(work / start))
        data = ["--calibration-data", dataset, *CALIBRATION, "--params-dtype", arguments.params_dtype]
        one_shot.run(
            "prune", megatron / start,
            [
                *maskllm, "prune", "--load", megatron / "dense", "--output", megatron / start, "--method", start,
                *([] if start == "magnitude" else data),
            ],
        )  # fmt: skip

    folder = _made(work / row)
    steps = Steps(folder)
    checkpoint, training = megatron / start, []
    if name in RECIPES:
        checkpoint = folder / "trained"
        training = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}",
            "-m", "maskllm.train", "--pretrained-checkpoint", megatron / start, "--load", checkpoint, "--save", checkpoint,
            "--save-interval", "25", "--data-path", dataset, "--split", "100,0,0", "--eval-iters", "0", "--seq-length", SEQ_LENGTH,
            "--global-batch-size", BATCH, "--micro-batch-size", BATCH // arguments.processes, "--params-dtype", arguments.params_dtype,
            "--log-interval", "5", *RECIPES[name].command(rate, seed, iterations),
        ]  # fmt: skip
        steps.run("train", checkpoint, training, can_resume=True)
    directory = Path(arguments.hf)
    if name != "dense":
        directory = folder / "hf"
        trimmed = folder / "trimmed"
        steps.run("trim", trimmed, [*maskllm, "trim", "--load", checkpoint, "--output", trimmed])
        steps.run("export", directory, [*maskllm, "export", "--load", trimmed, "--output", directory])
    file = folder / "perplexity.json"
    steps.run(
        "evaluate", file,
        [
            *maskllm, "evaluate", "--model", directory, "--data", arguments.eval_data, *EVALUATION,
            "--params-dtype", arguments.params_dtype, "--json", file,
        ],
    )  # fmt: skip
    perplexity = read_json_object(file)
    write_json(
        _made(RESULTS) / f"{row}.json",
        {
            "recipe": name,
            "rate": rate,
            "seed": seed if rate else None,
            "tokens": iterations * SEQ_LENGTH * BATCH if rate else 0,
            "perplexity": perplexity["perplexity"],
            "evaluation": {key: perplexity[key] for key in ("data", "windows", "seq_length", "dtype")},
            "command": shlex.join(map(str, training[3:])),
            "seconds": steps.records["train"]["seconds"] if training else None,
            "peak_memory_bytes": steps.records["train"]["peak_memory_bytes"] if training else None,
            "machine": describe("cuda" if torch.cuda.is_available() else "cpu"),
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "versions": {package: metadata.version(package) for package in ("torch", "megatron-core", "transformers")},
        },
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def table() -> str:
    """All results as a Markdown table, by tokens, then by perplexity."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    by_recipe = {result["recipe"]: result["perplexity"] for result in results if not result["rate"]}
    dense, prior = by_recipe["dense"], by_recipe[PRIOR]
    lines = [
        "| recipe | learning rate | seed | training tokens | perplexity | gap closed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in sorted(results, key=lambda result: (result["tokens"], -result["perplexity"])):
        cells = [
            result["recipe"],
            result["rate"] or "-",
            result["seed"] or "-",
            f"{result['tokens']:,}",
            f"{result['perplexity']:.1f}",
        ]
        lines.append("| " + " | ".join(map(str, [*cells, f"{(prior - result['perplexity']) / (prior - dense):.1%}"])) + " |")
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("table", help="print the results as a Markdown table")
    verb = verbs.add_parser("run", help="make rows")
    verb.add_argument("--hf", required=True, metavar="DIR", help="dense model")
    verb.add_argument("--train-data", required=True, nargs="+", metavar="FILE", help="JSON lines to calibrate and train on")
    verb.add_argument("--eval-data", required=True, metavar="FILE", help="held-out text")
    verb.add_argument("--work", required=True, type=Path, metavar="DIR", help="folder for checkpoints")
    verb.add_argument("--tokens", type=float, default=1e5, metavar="N", help="training tokens (default: %(default)g)")
    verb.add_argument("--processes", type=int, default=1, help="data-parallel processes (default: %(default)s)")
    verb.add_argument("--params-dtype", default="fp32", help="dtype to compute in (default: %(default)s)")
    verb.add_argument("rows", nargs="+", metavar="ROW", help=f"dense, {', '.join(ONE_SHOT)}, {', '.join(RECIPES)}")
    return parser.parse_args(argv)


def main() -> None:
    """Run the rows, or print the table."""
    arguments = parse_arguments()
    if arguments.verb == "table":
        print(table())
    else:
        run(arguments)


if __name__ == "__main__":
    sys.exit(run_guarded("quality", main))
