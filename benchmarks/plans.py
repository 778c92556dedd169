"""What `maskllm plan` expects of LLaMA-2 7B under several options, for the tables of docs/memory.md.

    python -m benchmarks.plans [--json FILE]

The plans are calculated, not measured; benchmarks/plan_memory.py compares plans with runs.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import megatron_patches

megatron_patches.import_megatron()

from maskllm.cli.train_options import parse_arguments  # noqa: E402
from maskllm.files import write_json  # noqa: E402
from maskllm.planning.cost import GPUS, Cluster, checkpoint_bytes  # noqa: E402
from maskllm.planning.models import named_model  # noqa: E402
from maskllm.planning.plan import Option, option  # noqa: E402

MODEL = named_model("llama-2-7b")
CLUSTER = Cluster(GPUS["h100-80gb"])
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
SELECTIVE = "--sequence-parallel --recompute-granularity selective --recompute-modules mlp masked_weight"
TEACHER = "--kl-loss-coeff 1 --squarehead-loss-coeff 0.1"
MEMORY = [
    *((8, f"--tensor-model-parallel-size 8 {options}") for options in (
        "", "--sequence-parallel", SELECTIVE, FULL, "--sequence-parallel --optimizer-state-dtype bf16",
        f"--mask-logits-dtype bf16 --optimizer-state-dtype 8bit {FULL}",
    )),
    *((1, options) for options in (
        "", f"--optimizer-state-dtype bf16 {FULL}", f"--mask-logits-dtype bf16 --optimizer-state-dtype 8bit {FULL}",
    )),
]  # fmt: skip
"""GPUs and options."""
TRAINING = [f"--train {train} {teacher}".strip() for train in ("masks", "weights", "both") for teacher in ("", TEACHER)]
MANY_GPUS = f"--train both {TEACHER} --sequence-parallel --use-distributed-optimizer"


def plan(gpus: int, options: str) -> Option:
    """The plan for these options of `maskllm.train`."""
    return option(MODEL, parse_arguments(["--data-path", "any", *options.split()]), gpus, cluster=CLUSTER)


def main(argv: list[str] | None = None) -> None:
    """Plan, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args(argv)
    memory = [{"gpus": gpus, "options": options.strip(), "bytes": plan(gpus, options).bytes} for gpus, options in MEMORY]
    training: list[dict[str, Any]] = []
    for options in TRAINING:
        found, lean = (plan(8, f"--tensor-model-parallel-size 8 {options} {more}") for more in ("", SELECTIVE))
        numbers = {"bytes": found.bytes, "lean_bytes": lean.bytes, "seconds": found.cost.seconds}
        training.append({"options": options, **numbers, "checkpoint_bytes": checkpoint_bytes(MODEL, found.arguments)})
    many = plan(64, f"--tensor-model-parallel-size 8 {MANY_GPUS}")
    result = {"memory": memory, "training": training, "training_on_many": {"gpus": 64, "options": MANY_GPUS, "bytes": many.bytes}}
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
