"""How good `maskllm plan --device cpu` is: the peak memory of real runs under several layouts, compared with the plan.

    python -m benchmarks.plan_memory --hf DIR [--runs NAME...] [--json FILE]

A CPU counts as a small GPU. What a process allocates is its peak resident memory, minus that of a tiny model (55 thousand weights
per layer) in the same processes, plus the tiny model's own plan. So the libraries that a process loads do not count. The C library
is told to return freed memory instead of keeping it. Each run is two steps of 4 sequences of 512 random tokens, one sequence per
micro-batch.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import megatron_patches

megatron_patches.import_megatron()

from benchmarks.machine import describe  # noqa: E402
from maskllm.checkpoints.convert import convert  # noqa: E402
from maskllm.cli.train_options import parse_arguments  # noqa: E402
from maskllm.files import write_json  # noqa: E402
from maskllm.patterns import Pattern  # noqa: E402
from maskllm.planning.memory import Layout, largest_stage  # noqa: E402
from maskllm.planning.models import named_model  # noqa: E402
from maskllm.pruning.megatron import prune_without_data  # noqa: E402
from maskllm.pruning.solve import PruneSettings  # noqa: E402

RUNS = {
    "pipeline": ["--pipeline-model-parallel-size", "2"],
    "tensor": ["--tensor-model-parallel-size", "3"],
    "sequence": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "low-precision": [
        "--mask-logits-dtype", "bf16", "--optimizer-state-dtype", "8bit", "--recompute-granularity", "full",
        "--recompute-method", "uniform", "--recompute-num-layers", "1",
    ],
    "weights": ["--train", "weights"],
    "weights-teacher": ["--train", "weights", "--kl-loss-coeff", "1", "--squarehead-loss-coeff", "0.1"],
    "both-teacher": ["--train", "both", "--kl-loss-coeff", "1", "--squarehead-loss-coeff", "0.1"],
    "weights-and-masks": [
        "--train", "both", "--kl-loss-coeff", "1", "--squarehead-loss-coeff", "0.1", "--params-dtype", "bf16",
    ],
}  # fmt: skip
"""Name -> training options, which override SIZES."""
SIZES = [
    "--train-iters", "2", "--global-batch-size", "4", "--micro-batch-size", "1", "--seq-length", "512", "--params-dtype", "fp32",
    "--log-interval", "1", "--eval-iters", "0",
]  # fmt: skip


def make_inputs(hf: str | Path, folder: Path) -> tuple[dict[str, Path], Path]:
    """The tiny model and the model in `hf` as Megatron checkpoints with masks, and the prefix of a dataset that both can read."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 384, "hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(folder / "tiny-hf")
    checkpoints = {"tiny": folder / "tiny", "model": folder / "model"}
    for kind, source in (("tiny", folder / "tiny-hf"), ("model", hf)):
        convert(source, folder / f"{kind}-dense")
        prune_without_data(folder / f"{kind}-dense", checkpoints[kind], PruneSettings("magnitude", Pattern(2, 4)))
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, 250, 20000))
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / "data.idx"))
    return checkpoints, folder / "data"


def layout_of(run: str) -> Layout:
    """The layout of a run on as few ranks as possible."""
    arguments = parse_arguments(["--data-path", "any", *RUNS[run]])
    return Layout(arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size, 1)


def start(ranks: int, module: str, *arguments: object) -> None:
    """Run `python -m MODULE ARGUMENTS` in `ranks` processes. Raises SystemExit if it fails."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"] if ranks > 1 else []
    words = [sys.executable, "-m", *launcher, module, *map(str, arguments)]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-6000:])


def measure(
    runs: list[str], checkpoints: dict[str, Path], data: Path, folder: Path, *, start: Callable[..., object] = start
) -> dict[str, dict[str, Any]]:
    """Measured and planned bytes of the largest process in each of `runs`, which have the same number of ranks.

    One job, which `start` starts, trains all models, so that its processes load the libraries once.
    """
    commands = {
        (run, kind): ["--load", str(path), "--data-path", str(data), "--save", str(folder / f"{run}-{kind}"), *SIZES, *RUNS[run]]
        for run in runs
        for kind, path in checkpoints.items()
    }
    (folder / "trainings.json").write_text(json.dumps(list(commands.values())))
    (ranks,) = {layout_of(run).ranks for run in runs}
    start(ranks, "benchmarks.trainings", folder / "trainings.json")
    rows = {}
    for run in runs:
        peaks, plans = {}, {}
        for kind, path in checkpoints.items():
            lines = (folder / f"{run}-{kind}" / "metrics.jsonl").read_text().splitlines()
            peaks[kind] = max(json.loads(line)["peak_memory_gib"] for line in lines) * 2**30
            arguments = parse_arguments(commands[run, kind])
            plans[kind] = largest_stage(named_model(str(path)), arguments, layout_of(run), device="cpu").total
        rows[run] = {
            "options": RUNS[run],
            "ranks": ranks,
            "measured": peaks["model"] - peaks["tiny"] + plans["tiny"],
            "planned": plans["model"],
        }
    return rows


def main(argv: list[str] | None = None) -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR", help="a Hugging Face model, such as SmolLM2-135M")
    parser.add_argument(
        "--runs", nargs="+", choices=list(RUNS), help="default: all runs whose tensor parallel size divides the model's heads"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    heads = named_model(args.hf).num_query_groups
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints, data = make_inputs(args.hf, folder)
        for run in tqdm(args.runs or [run for run in RUNS if heads % layout_of(run).tensor == 0], desc="runs"):
            rows |= measure([run], checkpoints, data, folder)
    print(f"{describe()}, torch {torch.__version__}; GB per process, measured and planned, and their ratio")
    for run, row in rows.items():
        measured, planned = row["measured"], row["planned"]
        print(f"{run:17} {measured / 1e9:6.2f} {planned / 1e9:6.2f} {measured / planned:5.2f}   {' '.join(RUNS[run])}")
    if args.json:
        write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    main()
