"""How good `maskllm plan --device cpu` is: the memory that runs of a model take under several layouts, beside what was planned.

    python benchmarks/plan_memory.py --hf DIR [--runs NAME...] [--json FILE]

A CPU counts as a small GPU: what a process allocates is its peak resident memory beyond that of a process that has loaded the same
libraries, which is the same run of a model of 55 thousand weights a layer, whose own plan is added back. The C library is told to return
what is freed instead of keeping it. Each run is two steps of 4 sequences of 512 random tokens, one a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import megatron_patches

megatron_patches.import_megatron()

from maskllm.checkpoints.convert import convert  # noqa: E402
from maskllm.cli.train_options import parse_arguments  # noqa: E402
from maskllm.files import write_json  # noqa: E402
from maskllm.planning.memory import Layout, largest_stage  # noqa: E402
from maskllm.planning.models import named_model  # noqa: E402

RUNS = {
    "pipeline": (2, ["--pipeline-model-parallel-size", "2"]),
    "tensor": (3, ["--tensor-model-parallel-size", "3"]),
    "few-bits": (
        1,
        [
            "--mask-logits-dtype", "bf16", "--optimizer-state-dtype", "8bit", "--recompute-granularity", "full",
            "--recompute-method", "uniform", "--recompute-num-layers", "1",
        ],
    ),
}  # fmt: skip
"""A run's number of processes and options."""
SIZES = [
    "--global-batch-size", "4", "--micro-batch-size", "1", "--seq-length", "512", "--params-dtype", "fp32",
]  # fmt: skip
RETURN_WHAT_IS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def make_inputs(hf: str, folder: Path) -> tuple[dict[str, Path], str]:
    """The model and one of next to nothing as Megatron checkpoints, and an indexed dataset that both can read."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 384, "hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).save_pretrained(folder / "small-hf")
    checkpoints = {"small": folder / "small", "model": folder / "model"}
    convert(folder / "small-hf", checkpoints["small"])
    convert(hf, checkpoints["model"])
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, 250, 20000))
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / "data.idx"))
    return checkpoints, str(folder / "data")


def peak(checkpoint: Path, data: str, save: Path, processes: int, options: list[str]) -> tuple[float, float]:
    """Bytes measured (resident, libraries included) and planned (without them) of the process that has most in a run of two steps."""
    words = [
        "--load", str(checkpoint), "--data-path", data, "--save", str(save), "--train-iters", "2", "--log-interval", "1",
        "--eval-iters", "0", *options,
    ]  # fmt: skip
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "maskllm.train", *words],
        env=os.environ | RETURN_WHAT_IS_FREED,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-6000:])
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    arguments = parse_arguments(words)
    layout = Layout(arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size, 1)
    planned = largest_stage(named_model(str(checkpoint)), arguments, layout, device="cpu").total
    return max(line["peak_memory_gib"] for line in lines) * 2**30, planned


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hf", required=True, metavar="DIR", help="a Hugging Face model whose heads 3 divides, such as SmolLM2-135M"
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoints, data = make_inputs(args.hf, folder)
        for run in tqdm(args.runs, desc="runs"):
            processes, options = RUNS[run]
            (base, base_plan), (found, planned) = (
                peak(path, data, folder / run / kind, processes, [*SIZES, *options]) for kind, path in checkpoints.items()
            )
            rows[run] = {"measured": found - base + base_plan, "planned": planned}
    print(f"{platform.machine()}, torch {torch.__version__}; GB a process, measured and planned, and their ratio")
    for run, row in rows.items():
        measured, planned = row["measured"], row["planned"]
        print(f"{run:10} {measured / 1e9:6.2f} {planned / 1e9:6.2f} {measured / planned:5.2f}   {' '.join(RUNS[run][1])}")
    if args.json:
        write_json(args.json, {"torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
