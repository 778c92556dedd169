"""Run the same pipeline with two checkouts of the project and compare, bit for bit, everything that they write.

usage: python benchmarks/same_bits.py --before DIR --after DIR

A checkout is a copy of the repository with its kernels built. Both run the commands below on the same tiny random models and the same
text, on the CPU: preprocess, convert, prune, ten training steps under several layouts and options, resumed runs, trim, export and
evaluate. Everything they write is compared except FILES_NOT_COMPARED and the numbers that are times or memory: tensors, arrays, JSON
values, lines of metrics, and all other files byte for byte. Two more comparisons follow: each run that was resumed after five steps with
the run of ten steps, and the run that --after resumed from a checkpoint of --before with the run of --before. Exits with 1 if anything
differs. Checkpoints are read with torch.distributed.checkpoint, not with the code of a checkout.
"""

from __future__ import annotations

import argparse
import io
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

FILES_NOT_COMPARED = re.compile(r".*\.distcp|\.metadata|manifest\.json|\.lock|rank_\d+\.log")
"""Names of the files that hold checkpoint tensors (the tensors are compared instead), their checksums, and what a run says of itself."""
COSTS = re.compile(r".*(seconds|memory|_per_second).*")
"""Keys of JSON values that differ between two runs of the same code."""

STEPS, SAVE_INTERVAL = 10, 5
TRAIN = (
    f"--data-path data_text_document --split 90,10,0 --seq-length 64 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2 --min-lr 1e-3 "
    f"--log-interval 1 --eval-interval {SAVE_INTERVAL} --eval-iters 2 --save-interval {SAVE_INTERVAL}"
)
CALIBRATION = "--calibration-data data_text_document --calibration-samples 8 --seq-length 64 --pack --params-dtype fp32"
RUNS = {  # name: processes, prior, options
    "tp1": (1, "wanda", "--params-dtype fp32"),
    "tp2": (2, "wanda", "--params-dtype fp32 --tensor-model-parallel-size 2"),
    "pp2": (2, "wanda", "--params-dtype fp32 --pipeline-model-parallel-size 2 --async-save"),
    "dp2": (2, "magnitude", "--params-dtype fp32 --use-distributed-optimizer"),
    "bf16": (2, "sparsegpt", "--params-dtype bf16 --tensor-model-parallel-size 2 --sequence-parallel"),
    "low_precision": (1, "updated", "--params-dtype fp32 --mask-logits-dtype bf16 --optimizer-state-dtype 8bit"),
    "selective": (1, "wanda", "--params-dtype fp32 --recompute-granularity selective --recompute-modules mlp masked_weight"),
    "full": (1, "wanda", "--params-dtype fp32 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    "hard": (1, "wanda", "--params-dtype fp32 --hard --mask-sample-interval step"),
    "gpt2": (2, "gpt2/wanda", "--params-dtype fp32 --pipeline-model-parallel-size 2"),
}
RESUMED = ("tp1", "tp2")

Command = tuple[int, str]
"""How many processes, and the words after `python -m`."""


def prune(output: str, options: str, dense: str = "dense") -> str:
    """The words that prune the checkpoint `dense`."""
    return f"maskllm prune --load {dense} --output {output} --json {output}.json {options}"


def train(name: str) -> Command:
    """A run of `RUNS`; a second time, it goes on from what it finds in its directory."""
    processes, prior, options = RUNS[name]
    return processes, f"maskllm.train --pretrained-checkpoint {prior} --load run/{name} --save run/{name} {TRAIN} {options}"


def finish(name: str) -> list[Command]:
    """Trim, export and evaluate what the run `name` has learned."""
    evaluate = "--data ../inputs/held_out.txt --seq-length 64 --max-windows 8 --json"
    return [
        (1, f"maskllm trim --load run/{name} --output trimmed/{name} --json trim_{name}.json"),
        (1, f"maskllm export --load trimmed/{name} --output hf/{name} --mask-file {name}.mask.npz --json export_{name}.json"),
        (1, f"maskllm evaluate --model hf/{name} {evaluate} evaluate_hf_{name}.json"),
        (1, f"maskllm evaluate --load run/{name} --params-dtype fp32 {evaluate} evaluate_{name}.json"),
    ]


BEFORE_TRAINING: list[Command] = [
    (1, "maskllm preprocess --input ../inputs/text.jsonl --output-prefix data --tokenizer ../inputs/llama --append-eod"),
    (1, "maskllm convert --hf ../inputs/llama --output dense"),
    (1, "maskllm convert --hf ../inputs/gpt2 --output gpt2/dense"),
    (1, prune("magnitude", "--method magnitude")),
    (1, prune("wanda", f"--method wanda {CALIBRATION}")),
    (1, prune("sparsegpt", f"--method sparsegpt {CALIBRATION}")),
    (2, prune("updated", f"--method sparsegpt --update-weights {CALIBRATION}")),
    (1, prune("gpt2/wanda", f"--method wanda {CALIBRATION}", "gpt2/dense")),
]


def make_inputs(folder: Path) -> None:
    """Two random models with a tokenizer, JSON lines to learn from, and a held-out text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    documents = [text[:3000] for _, text in sorted(pydoc_data.topics.topics.items())][:60]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[10:]), encoding="utf-8")
    (folder / "held_out.txt").write_text("\n\n".join(documents[:10]), encoding="utf-8")

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")

    torch.manual_seed(0)
    shared = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.15}
    llama = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**shared, **llama, **heads)).to(torch.bfloat16).save_pretrained(folder / "llama")
    GPT2LMHeadModel(GPT2Config(**shared, n_embd=64, n_layer=2, n_head=4, n_positions=128)).save_pretrained(folder / "gpt2")
    for name in ("llama", "gpt2"):
        wrapped.save_pretrained(folder / name)


class Runner:
    """Runs commands with one checkout, in a folder of its own that holds relative paths alone, so that both checkouts write the same."""

    failed = threading.Event()
    """Some checkout's command has failed: the other ends after its own."""

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

    def run(self, command: Command) -> None:
        """One command and one line about it."""
        if self.failed.is_set():
            raise SystemExit(f"{self.name}: stopped, since the other checkout failed")
        processes, words = command
        launcher = [] if processes == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        started = time.monotonic()
        self._run([sys.executable, "-m", *launcher, *words.split()])
        print(f"{self.name:6} {time.monotonic() - started:5.1f} s  {words[:110]}", flush=True)

    def resume(self, name: str, checkpoints: Path, keep: str) -> None:
        """Run `name` again from the checkpoint after five steps below `checkpoints`; keep what is there now as run/KEEP."""
        run = self.folder / "run" / name
        run.rename(run.with_name(keep))
        saved = f"iter_{SAVE_INTERVAL:07d}"
        shutil.copytree(checkpoints / saved, run / saved)
        (run / "latest_checkpointed_iteration.txt").write_text(f"{SAVE_INTERVAL}\n")
        shutil.copy(checkpoints / "metrics.jsonl", run)
        self.run(train(name))

    def pipeline(self) -> None:
        """Every command; the resumed runs are in run/NAME, the runs of ten steps before them in run/NAME_whole."""
        for command in [*BEFORE_TRAINING, *map(train, RUNS)]:
            self.run(command)
        for name in RESUMED:
            self.resume(name, self.folder / "run" / name, f"{name}_whole")
        for command in [*finish("tp1"), *finish("gpt2")]:
            self.run(command)


def without_costs(value: Any) -> Any:
    """JSON values without times and memory."""
    if isinstance(value, dict):
        return {key: without_costs(one) for key, one in value.items() if not COSTS.fullmatch(key)}
    return [without_costs(one) for one in value] if isinstance(value, list) else value


def read_checkpoint(directory: Path) -> dict[str, Any]:
    """Everything that a torch_dist checkpoint holds by key: tensors, and objects as Megatron stores them."""
    reader = dcp.FileSystemReader(directory)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    ".json": ("JSON values", lambda path: without_costs(json.loads(path.read_text()))),
    ".jsonl": ("lines", lambda path: [without_costs(json.loads(line)) for line in path.read_text().splitlines()]),
    ".npz": ("arrays", lambda path: dict(np.load(path))),
    ".pt": ("values of common.pt", lambda path: torch.load(path, weights_only=True)),
}
"""By suffix: what the entries are called, and how a file is read. Other files are compared byte for byte."""


def difference(first: Any, second: Any, name: str = "") -> str | None:
    """The first difference of two values, with its place; None if all bits are the same (NaN equals itself, 0 is not -0)."""
    if type(first) is not type(second):
        return f"{name}: {first!r:.80} and {second!r:.80}"
    if isinstance(first, list | tuple):
        first, second = dict(enumerate(first)), dict(enumerate(second))
    if isinstance(first, dict):
        for key in dict.fromkeys([*first, *second]):
            if key not in first or key not in second:
                return f"{name}[{key}]: only in the {'first' if key in first else 'second'}"
            if found := difference(first[key], second[key], f"{name}[{key}]"):
                return found
        return None
    if isinstance(first, io.BytesIO):
        first, second = first.getvalue(), second.getvalue()
    if isinstance(first, bytes):
        first, second = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    if isinstance(first, np.ndarray):
        first, second = torch.from_numpy(first.copy()), torch.from_numpy(second.copy())
    if isinstance(first, torch.Tensor):
        first, second = (value.detach().contiguous() for value in (first, second))
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return f"{name}: {first.dtype} {list(first.shape)} and {second.dtype} {list(second.shape)}"
        bits = [value.reshape(-1).view(torch.uint8).view(-1, value.element_size()) for value in (first, second)]
        places = (bits[0] != bits[1]).any(-1).nonzero().view(-1)
        if len(places) == 0:
            return None
        place, values = int(places[0]), [value.reshape(-1)[places[0]].item() for value in (first, second)]
        return f"{name}: {len(places)} of {first.numel()} entries, at {place} {values[0]!r} and {values[1]!r}"
    return None if repr(first) == repr(second) else f"{name}: {first!r:.80} and {second!r:.80}"


def compare(first: Path, second: Path, counts: Counter[str]) -> list[str]:
    """Compare two files or directories; returns a line for each file or checkpoint that differs, and counts what was compared."""
    if not (first.exists() and second.exists()):
        return [f"{first.name}: only {first if first.exists() else second} is there"]
    if first.is_dir() and second.is_dir():
        names = {path.name for folder in (first, second) for path in folder.iterdir()}
        found = [line for name in sorted(names) for line in compare(first / name, second / name, counts)]
        if (first / ".metadata").is_file() and (second / ".metadata").is_file():
            tensors = read_checkpoint(first)
            counts["checkpoints"] += 1
            counts["tensors"] += sum(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
            found += filter(None, [difference(tensors, read_checkpoint(second), str(first))])
        return found
    if FILES_NOT_COMPARED.fullmatch(first.name):
        return []
    kind, read = READERS.get(first.suffix, ("bytes", Path.read_bytes))
    one, other = read(first), read(second)
    counts["files"] += 1
    counts[kind] += len(one)
    return list(filter(None, [difference(one, other, str(first))]))


def listed(counts: Counter[str]) -> str:
    """What was compared, for people."""
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.items())


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
    runners[1].resume("tp2", old / "run" / "tp2_whole", "tp2_resumed")
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


def main() -> int:
    """Parse, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="a checkout of the project, its kernels built")
    parser.add_argument("--after", type=Path, required=True, metavar="DIR", help="the checkout that must write the same")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for all outputs, which stay; default: a temporary one")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        differ = run_and_compare(args.before.resolve(), args.after.resolve(), (args.work or Path(temporary) / "work").resolve())
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
