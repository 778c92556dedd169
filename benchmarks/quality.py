"""The quality of a way to train: perplexity and zero-shot accuracy of the exported model, at equal training tokens.

    python -m benchmarks.quality --hf DIR --train-data FILE... --eval-data FILE [--tasks-data DIR [--limit N]] --work DIR --row ROW
        [--json FILE]

A ROW is dense, a one-shot model (magnitude, wanda, sparsegpt, sparsegpt-fitted), `RECIPE:RATE` or `RECIPE:RATE:SEED`, such as
`weights-kl:6e-4:1`. The one-shot model is made first, calibrated on the first training file, and the recipe trained from it; then the
model is trimmed, exported and evaluated, all by public commands.
Rows share the folder --work: steps that are done are skipped, and an interrupted training goes on.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskllm.errors import MaskLLMError
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_json
from maskllm.quickstart.steps import Steps

PRIOR = "sparsegpt"
"""The one-shot mask that training starts from."""
FITTED = "sparsegpt-fitted"
"""SparseGPT's mask with weights by least squares, calibrated on eight times as many samples as the others."""
ONE_SHOT = {
    "magnitude": ["--method", "magnitude"],
    "wanda": ["--method", "wanda"],
    PRIOR: ["--method", "sparsegpt"],
    FITTED: ["--method", "sparsegpt", "--least-squares"],
}
"""The one-shot models and their options of `maskllm prune`."""
BATCH = 2
TASKS = ("piqa", "arc_easy")
CE_KL = ["--ce-loss-coeff", "0.67", "--kl-loss-coeff", "0.33"]
KL = ["--ce-loss-coeff", "0", "--kl-loss-coeff", "1"]
MASKS = ["--prior-strength", "5", "--gumbel-scale-range", "500", "1000"]
"""In so few steps, with the default scale the masks stay soft too long, and what is learned for them harms the winners. With a much larger
one they soon stop changing."""
BOTH = ["--prior-strength", "5", "--gumbel-scale-range", "500", "5000", "--lr", "5e-4", "--min-lr", "5e-5", "--weight-reg", "0"]

CAST = ["--lr-warmup-iters", "10", "--l1-decay-coeff", "2e-4"]
"""The default decay, for a hundred times as many steps, leaves the weights outside of the mask as they are."""


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    options: list[str]
    """Options of `maskllm.train`."""
    start: str = PRIOR

    def command(self, rate: str, seed: int, iterations: int) -> list[str]:
        """The options with this learning rate (of the logits with `--train masks`, else of the weights), which decays to a tenth."""
        prefix = "--" if self.options[:2] == ["--train", "masks"] else "--weights-"
        return [
            *self.options, f"{prefix}lr", rate, f"{prefix}min-lr", f"{float(rate) / 10:g}", "--seed", str(seed),
            "--train-iters", str(iterations),
        ]  # fmt: skip


RECIPES = {
    "masks": Recipe(["--train", "masks", *MASKS]),
    "weights-ce": Recipe(["--train", "weights"]),
    "weights-kl": Recipe(["--train", "weights", *KL]),
    "weights-squarehead": Recipe(["--train", "weights", "--squarehead-loss-coeff", "1"]),
    "weights-ce-kl": Recipe(["--train", "weights", *CE_KL]),
    "both-ce-kl": Recipe(["--train", "both", *CE_KL, *BOTH]),
    "cast": Recipe(["--train", "weights", "--weights-optimizer", "cast", "--pattern", "2:4", *CE_KL, *CAST], start="dense"),
    "both-kl": Recipe(["--train", "both", *KL, *BOTH]),
    "fitted-kl": Recipe(["--train", "weights", *KL], start=FITTED),
}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the row; returns its numbers."""
    name, rate, seed = _parse(arguments.row)
    work: Path = arguments.work
    maskllm = [sys.executable, "-m", "maskllm"]
    megatron, datasets = work / "megatron", []
    seq_length = arguments.seq_length
    iterations = max(1, round(arguments.tokens / (seq_length * BATCH)))
    row = name if rate is None else f"{name},lr={rate},seed={seed},tokens={iterations * seq_length * BATCH}"
    start = RECIPES[name].start if name in RECIPES else name

    common = Steps(_made(work / "common"))
    for number, file in enumerate(arguments.train_data):
        folder = work / f"data-{number}"
        preprocess = ["--input", file, "--output-prefix", folder / "train", "--tokenizer", arguments.hf, "--append-eod"]
        common.run(f"preprocess {number}", folder, [*maskllm, "preprocess", *preprocess])
        datasets.append(folder / "train_text_document")
    common.run("convert", megatron / "dense", [*maskllm, "convert", "--hf", arguments.hf, "--output", megatron / "dense"])
    if start in ONE_SHOT:
        one_shot = Steps(_made(work / start))
        samples = arguments.calibration_samples * (8 if start == FITTED else 1)
        data = [
            "--calibration-data", datasets[0], "--calibration-samples", samples, "--seq-length", seq_length, "--pack",
            "--params-dtype", arguments.params_dtype,
        ]  # fmt: skip
        one_shot.run(
            "prune", megatron / start,
            [
                *maskllm, "prune", "--load", megatron / "dense", "--output", megatron / start, *ONE_SHOT[start],
                *([] if start == "magnitude" else data),
            ],
        )  # fmt: skip

    folder = _made(work / row)
    steps = Steps(folder)
    checkpoint, training = megatron / start, []
    if name in RECIPES:
        checkpoint = folder / "trained"
        options = RECIPES[name].command(rate, seed, iterations)
        training = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}",
            "-m", "maskllm.train", "--pretrained-checkpoint", megatron / start, "--load", checkpoint, "--save", checkpoint,
            "--save-interval", max(25, iterations // 10), "--keep-last", 1, "--split", "100,0,0",
            "--data-path", *(part for dataset in datasets for part in (1, dataset)),
            "--eval-iters", "0", "--seq-length", seq_length, "--global-batch-size", BATCH,
            "--micro-batch-size", BATCH // arguments.processes, "--params-dtype", arguments.params_dtype, "--log-interval", "5",
            *(["--teacher", megatron / "dense"] if start == FITTED else []), *options,
        ]  # fmt: skip
        steps.run("train", checkpoint, training, can_resume=True)
    directory = Path(arguments.hf)
    if name != "dense":
        directory = folder / "hf"
        trimmed = folder / "trimmed"
        steps.run("trim", trimmed, [*maskllm, "trim", "--load", checkpoint, "--output", trimmed])
        steps.run("export", directory, [*maskllm, "export", "--load", trimmed, "--output", directory])
    evaluate = [*maskllm, "evaluate", "--model", directory, "--params-dtype", arguments.params_dtype, "--json"]
    file, tasks_file = folder / "perplexity.json", folder / "tasks.json"
    windows = ["--seq-length", arguments.eval_seq_length, "--max-windows", arguments.eval_windows]
    steps.run("evaluate", file, [*evaluate, file, "--data", arguments.eval_data, *windows])
    perplexity, tasks = read_json_object(file), None
    if arguments.tasks_data is not None:
        limit = [] if arguments.limit is None else ["--limit", arguments.limit]
        steps.run(
            "evaluate tasks", tasks_file, [*evaluate, tasks_file, "--tasks", *TASKS, "--tasks-data", arguments.tasks_data, *limit]
        )
        scores = read_json_object(tasks_file)["models"][0]["tasks"]
        tasks = {task: {"items": found["items"], **found["metrics"]["acc"]} for task, found in scores.items()}
    record = steps.records.get("train", {})
    return {
        "recipe": name,
        "rate": rate,
        "seed": seed if rate else None,
        "tokens": iterations * seq_length * BATCH if rate else 0,
        "options": shlex.join(options) if training else None,
        "perplexity": perplexity["perplexity"],
        "evaluation": {key: perplexity[key] for key in ("windows", "seq_length", "dtype")},
        "tasks": tasks,
        "seconds": record.get("seconds"),
        "peak_memory_bytes": record.get("peak_memory_bytes"),
    }


def _parse(row: str) -> tuple[str, str | None, int]:
    recipe, *rest = row.split(":")
    if not rest and (recipe == "dense" or recipe in ONE_SHOT):
        return recipe, None, 0
    if recipe not in RECIPES or len(rest) not in (1, 2):
        names = ", ".join(RECIPES)
        raise MaskLLMError(
            f"--row {row}: wanted dense, {', '.join(ONE_SHOT)}, RECIPE:RATE or RECIPE:RATE:SEED; RECIPE is one of {names}"
        )
    return recipe, rest[0], int(rest[1]) if len(rest) > 1 else 1234


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(argv: list[str] | None = None) -> None:
    """Make the row and print or write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR", help="dense model")
    parser.add_argument("--train-data", required=True, nargs="+", metavar="FILE", help="JSON lines to train on, in equal parts")
    parser.add_argument("--eval-data", required=True, metavar="FILE", help="held-out text")
    parser.add_argument("--tasks-data", metavar="DIR", help=f"also evaluate {' and '.join(TASKS)} with the files in this folder")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task only")
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="folder for checkpoints")
    parser.add_argument("--row", required=True, metavar="ROW", help="what to measure")
    parser.add_argument("--tokens", type=float, default=1e5, metavar="N", help="training tokens (default: %(default)g)")
    parser.add_argument("--seq-length", type=int, default=512, help="of calibration and training (default: %(default)s)")
    parser.add_argument("--calibration-samples", type=int, default=16, help="(default: %(default)s)")
    parser.add_argument("--eval-seq-length", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--eval-windows", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes (default: %(default)s)")
    parser.add_argument("--params-dtype", default="fp32", help="dtype to compute in (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    arguments = parser.parse_args(argv)
    row = run(arguments)
    print(f"{arguments.row}: perplexity {row['perplexity']:.2f}", row["tasks"] or "")
    if arguments.json:
        write_json(arguments.json, row)


if __name__ == "__main__":
    sys.exit(run_guarded("quality", main))
