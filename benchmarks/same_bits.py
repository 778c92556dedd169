"""Run the same pipeline with two checkouts of the project and compare everything that they write, bit for bit.

usage: python -m benchmarks.same_bits --before DIR --after DIR

A checkout is a copy of the repository with its kernels built. Both run the same commands on the same tiny random models and the same
text, on the CPU: preprocess, convert, prune, ten training steps with several parallel layouts and options (`RUNS`), resumed runs, trim,
export and evaluate. `bitwise.compare` compares all outputs. It also compares each resumed run with its uninterrupted run, and a run of
--before with the run that --after resumed from its checkpoint. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.bitwise import compare

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": (torch.bfloat16, SIZES | {"num_hidden_layers": 4, "tie_word_embeddings": True}),
    "nemotron": (torch.bfloat16, SIZES | {"num_hidden_layers": 2}),
    "gpt2": (torch.float32, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}

STEPS, SAVE_INTERVAL = 10, 5
TRAIN = (
    f"--data-path data_text_document --split 90,10,0 --seq-length 64 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2 --min-lr 1e-3 "
    f"--log-interval 1 --eval-interval {SAVE_INTERVAL} --eval-iters 2 --save-interval {SAVE_INTERVAL}"
)
CALIBRATION = "--calibration-data data_text_document --calibration-samples 8 --seq-length 64 --pack --params-dtype fp32"
EVALUATE = "--data ../inputs/held_out.txt --seq-length 64 --max-windows 8 --json"
RUNS = {  # name: processes, prior, options
    "tp1": (1, "wanda", "--params-dtype fp32"),
    "low_precision": (1, "sparsegpt", "--params-dtype fp32 --mask-logits-dtype bf16 --optimizer-state-dtype 8bit"),
    "selective": (1, "wanda", "--params-dtype fp32 --recompute-granularity selective --recompute-modules mlp masked_weight"),
    "full": (1, "wanda", "--params-dtype fp32 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "hard": (1, "wanda", "--params-dtype fp32 --hard --mask-sample-interval step"),
    "tp2": (2, "wanda", "--params-dtype fp32 --tensor-model-parallel-size 2"),
    "pp2": (2, "wanda", "--params-dtype fp32 --pipeline-model-parallel-size 2 --async-save"),
    "dp2": (2, "magnitude", "--params-dtype fp32 --use-distributed-optimizer"),
    "bf16": (2, "sparsegpt", "--params-dtype bf16 --tensor-model-parallel-size 2 --sequence-parallel"),
    "gpt2": (2, "gpt2/wanda", "--params-dtype fp32 --pipeline-model-parallel-size 2"),
}
RESUMED = ("tp1", "tp2")

IN_TURN = """
import runpy, sys
for command in sys.argv[1:]:
    print(command, file=sys.stderr, flush=True)
    sys.argv = command.split()
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""
"""A program that runs each of its arguments as `python -m` would, but starts Python and imports PyTorch only once."""


def prune_command(output: str, options: str, dense: str = "dense") -> str:
    """The command that prunes the checkpoint `dense`."""
    return f"maskllm prune --load {dense} --output {output} --json {output}.json {options}"


def train_command(name: str) -> str:
    """The command that starts a run of `RUNS`, or resumes it if run/NAME holds a checkpoint."""
    _, prior, options = RUNS[name]
    return f"maskllm.train --pretrained-checkpoint {prior} --load run/{name} --save run/{name} {TRAIN} {options}"


def finish_commands(load: str) -> list[str]:
    """The commands that trim, export and evaluate the checkpoint `load`."""
    name = load.replace("/", "_")
    return [
        f"maskllm trim --load {load} --output trimmed/{name} --json trim_{name}.json",
        f"maskllm export --load trimmed/{name} --output hf/{name} --mask-file {name}.mask.npz --json export_{name}.json",
        f"maskllm evaluate --model hf/{name} {EVALUATE} evaluate_hf_{name}.json",
        f"maskllm evaluate --load {load} --params-dtype fp32 {EVALUATE} evaluate_{name}.json",
    ]


FIRST = [
    "maskllm preprocess --input ../inputs/text.jsonl --output-prefix data --tokenizer ../inputs/llama --append-eod",
    "maskllm convert --hf ../inputs/llama --output dense",
    "maskllm convert --hf ../inputs/gpt2 --output gpt2/dense",
    "maskllm convert --hf ../inputs/nemotron --output nemotron/dense",
    prune_command("magnitude", "--method magnitude"),
    prune_command("unstructured", "--method magnitude --sparsity 0.6"),
    prune_command("wanda", f"--method wanda {CALIBRATION}"),
    prune_command("sparsegpt", f"--method sparsegpt {CALIBRATION}"),
    prune_command("gpt2/wanda", f"--method wanda {CALIBRATION}", "gpt2/dense"),
    prune_command("nemotron/sparsegpt", f"--method sparsegpt {CALIBRATION}", "nemotron/dense"),
]
LAST = [
    *(command for load in ("run/tp1", "run/gpt2", "nemotron/sparsegpt", "unstructured") for command in finish_commands(load)),
    f"maskllm evaluate --model ../inputs/llama --mask run_tp1.mask.npz {EVALUATE} evaluate_with_mask.json",
]


def make_inputs(folder: Path) -> None:
    """Random models with a byte-level tokenizer, JSON lines to learn from, and a held-out text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True)
    documents = [text[:3000] for _, text in sorted(pydoc_data.topics.topics.items())][:60]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[10:]), encoding="utf-8")
    (folder / "held_out.txt").write_text("\n\n".join(documents[:10]), encoding="utf-8")

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, (dtype, settings) in MODELS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, vocab_size=260, bos_token_id=0, eos_token_id=1, initializer_range=0.15, **settings)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder / name)
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / name)


class Runner:
    """Runs commands with one checkout, in its own folder. All paths are relative, so both checkouts record the same paths."""

    failed = threading.Event()
    """Set when a command fails; the other checkout then starts no further command."""

    def __init__(self, name: str, checkout: Path, folder: Path) -> None:
        self.name = name
        self.folder = folder
        folder.mkdir()
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.environment = os.environ | quiet | {"PYTHONPATH": str(checkout)}
        found = self._run([sys.executable, "-c", "import maskllm; print(maskllm.__file__)"])
        if not Path(found.strip()).is_relative_to(checkout):
            raise SystemExit(f"--{name} {checkout}: Python imports {found.strip()} instead")
        if not list(checkout.glob("maskllm/ops/_kernels*.so")):
            raise SystemExit(f"--{name} {checkout}: no maskllm/ops/_kernels*.so; build its kernels")

    def _run(self, words: list[str]) -> str:
        done = subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            self.failed.set()
            raise SystemExit(f"{self.name}: {' '.join(words)}\nexit status {done.returncode}:\n{done.stderr[-4000:]}")
        return done.stdout

    def run(self, processes: int, *commands: str) -> None:
        """Run one command in several processes under torchrun, or several commands in one process; print them and their seconds."""
        if self.failed.is_set():
            raise SystemExit(f"{self.name}: stopped, since the other checkout failed")
        started = time.monotonic()
        if processes == 1:
            self._run([sys.executable, "-c", IN_TURN, *commands])
        else:
            torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
            self._run([sys.executable, "-m", *torchrun, *commands[0].split()])
        lines = f"\n{'':16}".join(re.split(" --(data|calib|seq)", command)[0] for command in commands)
        print(f"{self.name:6} {time.monotonic() - started:6.1f} s {lines}", flush=True)

    def train(self, name: str) -> None:
        """Start or resume one of `RUNS`."""
        self.run(RUNS[name][0], train_command(name))

    def go_back(self, name: str, whole: Path, keep: str) -> None:
        """Rename run/NAME to run/KEEP and copy the state after five steps of the run in `whole` to run/NAME, to resume it there."""
        run = self.folder / "run" / name
        run.rename(run.with_name(keep))
        saved = f"iter_{SAVE_INTERVAL:07d}"
        shutil.copytree(whole / saved, run / saved)
        (run / "latest_checkpointed_iteration.txt").write_text(f"{SAVE_INTERVAL}\n")
        shutil.copy(whole / "metrics.jsonl", run)

    def pipeline(self) -> None:
        """Run every command. Resumed runs are in run/NAME, and the runs of ten steps that they must equal in run/NAME_whole."""
        self.run(1, *FIRST, *(train_command(name) for name, (processes, *_) in RUNS.items() if processes == 1))
        for name, (processes, *_) in RUNS.items():
            if processes > 1:
                self.train(name)
        self.run(2, prune_command("updated", f"--method sparsegpt --update-weights {CALIBRATION}"))
        for name in RESUMED:
            self.go_back(name, self.folder / "run" / f"{name}_whole", f"{name}_whole")
            self.train(name)
        self.run(1, *LAST)


def listed(counts: Counter[str]) -> str:
    """What was compared, for people."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)


def show(title: str, first: Path, second: Path, totals: Counter[str]) -> int:
    """Compare, print a line, and a line for each difference; returns how many differ."""
    counts: Counter[str] = Counter()
    found = compare(first, second, counts)
    totals.update(counts)
    print(f"{title:34} {listed(counts)}: {f'{len(found)} DIFFER' if found else 'same'}", *found, sep="\n    ", flush=True)
    return len(found)


def run_and_compare(before: Path, after: Path, work: Path) -> int:
    """Run everything in `work` and compare; returns how many files and checkpoints differ."""
    make_inputs(work / "inputs")
    runners = [Runner(name, checkout, work / name) for name, checkout in (("before", before), ("after", after))]
    with ThreadPoolExecutor() as pool:  # side by side
        list(pool.map(Runner.pipeline, runners))
    old, new = (runner.folder for runner in runners)
    runners[1].go_back("tp2", old / "run" / "tp2_whole", "tp2_resumed")
    runners[1].train("tp2")
    (new / "run" / "tp2").rename(work / "tp2_across")
    (new / "run" / "tp2_resumed").rename(new / "run" / "tp2")
    totals: Counter[str] = Counter()
    entries = {str(path.relative_to(folder)) for folder in (old, new) for path in [*folder.iterdir(), *folder.glob("run/*")]}
    differ = sum(show(name, old / name, new / name, totals) for name in sorted(entries - {"run"}))
    for name in RESUMED:
        for folder in (old, new):
            title = f"{folder.name}: {name} resumed, and not"
            differ += show(title, folder / "run" / name, folder / "run" / f"{name}_whole", totals)
    differ += show("before: tp2; resumed by after", old / "run" / "tp2_whole", work / "tp2_across", totals)
    print(f"\ncompared in all: {listed(totals)}; {differ or 'none'} differ")
    return differ


def main(argv: list[str] | None = None) -> int:
    """Parse, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="a checkout of the project, its kernels built")
    parser.add_argument("--after", type=Path, required=True, metavar="DIR", help="the checkout that must write the same")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="a new folder for all outputs, which stay; default: a temporary one"
    )
    args = parser.parse_args(argv)
    if args.work is not None and args.work.exists():
        parser.error(f"--work {args.work}: exists already; wanted a new folder")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        differ = run_and_compare(args.before.resolve(), args.after.resolve(), (args.work or Path(temporary) / "work").resolve())
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
