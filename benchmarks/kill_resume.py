"""Kill and resume a tiny run many times at random moments: it must end with the tensors of the run that nothing interrupted.

usage: python -m benchmarks.kill_resume [--cycles 200] [--train both] [--json FILE]

Each cycle starts the run under torchrun and kills either one rank or torchrun and all ranks with SIGKILL: a sixth of them after a random
time of up to half of the whole run's, most often before the first step, the others at a random moment after a random number of steps, up
to two saves later. A run that reaches its end is compared, bit for bit, with the uninterrupted one: weights, logits and optimizer states.
Then the cycles go on with a new one; the last run is taken to its end. Ctrl-C ends the cycles early. Exits with 1 where a tensor differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

import megatron_patches

megatron_patches.import_megatron()

from maskllm.checkpoints.finding import LATEST  # noqa: E402
from maskllm.checkpoints.reading import resolve  # noqa: E402
from maskllm.files import write_json  # noqa: E402

SAVE_INTERVAL = 5
_WEIGHTS = ["--weights-lr", 0.003, "--ce-loss-coeff", 0.5, "--kl-loss-coeff", 0.5, "--params-dtype", "bf16"]
OPTIONS = {
    "masks": ["--lr", 0.01, "--params-dtype", "fp32"],
    "weights": _WEIGHTS,
    "both": ["--lr", 0.01, *_WEIGHTS],
}
"""What is trained -> options of the run. Weights are trained in bf16, with fp32 masters, and against the dense weights."""


def make_inputs(folder: Path) -> tuple[Path, str]:
    """A pruned checkpoint of a random two-layer LLaMA and an indexed dataset of random tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import LlamaConfig, LlamaForCausalLM

    from maskllm.checkpoints.convert import convert
    from maskllm.patterns import Pattern
    from maskllm.pruning.megatron import prune_without_data
    from maskllm.pruning.solve import PruneSettings

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=0)).save_pretrained(folder / "hf")
    convert(str(folder / "hf"), str(folder / "dense"))
    prune_without_data(str(folder / "dense"), str(folder / "pruned"), PruneSettings("magnitude", Pattern(2, 4)))
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), dtype=np.uint16)
    generator = np.random.default_rng(0)
    for _ in range(64):
        tokens = torch.from_numpy(generator.integers(1, 256, 500))
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(folder / "data.idx"))
    return folder / "pruned", str(folder / "data")


def command(model: Path, data: str, save: Path, steps: int, ranks: int, trained: str) -> list[str]:
    """The run, which saves in the background."""
    words = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "maskllm.train",
        "--data-path", data, "--pretrained-checkpoint", model, "--save", save, "--load", save, "--train-iters", steps,
        "--global-batch-size", 4, "--seq-length", 64, "--train", trained, *OPTIONS[trained], "--log-interval", 1, "--eval-iters", 0,
        "--save-interval", SAVE_INTERVAL, "--async-save", "--keep-last", 2,
    ]  # fmt: skip
    return list(map(str, words))


def start(words: list[str], log: Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_to_the_end(words: list[str], log: Path) -> float:
    """Returns the seconds it took."""
    begin = time.monotonic()
    if start(words, log).wait() != 0:
        raise SystemExit(f"the run failed:\n{log.read_text()[-3000:]}")
    return time.monotonic() - begin


def steps_logged(log: Path, since: int) -> int:
    """How many steps the console has had, from the byte `since` on."""
    with log.open("rb") as file:
        file.seek(since)
        return file.read().count(b"train iteration ")


def live(process: subprocess.Popen, log: Path, since: int, steps: int | None, seconds: float) -> None:
    """Wait until the run has done `steps` steps and then, or at once for None, for `seconds`; no longer than the run lives."""
    while steps is not None and process.poll() is None and steps_logged(log, since) < steps:
        time.sleep(0.005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def kill(process: subprocess.Popen, *, one_rank: bool, choose: random.Random) -> None:
    """SIGKILL to one rank, after which torchrun ends the others, or to torchrun and everything it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        agent = psutil.Process(process.pid)
        ranks = agent.children()
        if one_rank and ranks:
            victims = [choose.choice(ranks)]
        else:
            agent.suspend()  # or it may start one more while it is killed, which would live on and hold the output
            victims = [*agent.children(recursive=True), agent]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()


def saved_tensors(save: Path) -> dict[str, torch.Tensor]:
    tensors = resolve(save).tensors
    return {key: tensors[key].load() for key in tensors}


def iteration(save: Path) -> int:
    return int((save / LATEST).read_text()) if (save / LATEST).is_file() else 0


def measure(cycles: int, steps: int, ranks: int, seed: int, trained: str, folder: Path) -> dict[str, Any]:
    """Run the cycles and compare; returns the report as JSON values."""
    choose = random.Random(seed)
    model, data = make_inputs(folder)
    whole, killed, log = folder / "whole", folder / "killed", folder / "log"
    seconds = run_to_the_end(command(model, data, whole, steps, ranks, trained), log)
    expected = saved_tensors(whole)
    words = command(model, data, killed, steps, ranks, trained)
    history: list[dict[str, Any]] = []
    differ: set[str] = set()
    runs = 0

    def compare() -> None:
        nonlocal runs
        found = saved_tensors(killed)
        differ.update(
            key for key in expected | found if key not in expected or key not in found or not torch.equal(expected[key], found[key])
        )
        runs += 1
        shutil.rmtree(killed)

    # A flag, since an exception in the midst of Popen's own waiting can leave its lock behind.
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    with tqdm(total=cycles, desc="kill and resume", unit="cycle", file=sys.stderr) as bar:
        while len(history) < cycles and not interrupted.is_set():
            since, saved_before = log.stat().st_size, iteration(killed)
            process = start(words, log)
            wanted = choose.randrange(2 * SAVE_INTERVAL) if choose.random() > 1 / 6 else None
            moment = choose.uniform(0, 0.2 if wanted is not None else seconds / 2)
            one_rank = choose.random() < 0.5
            live(process, log, since, wanted, moment)
            if process.poll() is None:
                kill(process, one_rank=one_rank, choose=choose)
                done = steps_logged(log, since)
                saved = iteration(killed) > saved_before
                history.append({"steps": done, "seconds": round(moment, 3), "one_rank": one_rank, "saved": saved})
                bar.update()
            elif process.returncode == 0:
                compare()
            elif not interrupted.is_set():
                raise SystemExit(f"a resumed run failed:\n{log.read_text()[-3000:]}")
    signal.signal(signal.SIGINT, before)
    if interrupted.is_set():
        print("interrupted: the report is of the cycles until now", file=sys.stderr)
    run_to_the_end(words, log)
    compare()
    return {
        "cycles": len(history),
        "steps": steps,
        "ranks": ranks,
        "seed": seed,
        "train": trained,
        "uninterrupted_seconds": round(seconds, 3),
        "runs_compared": runs,
        "killed_before_a_step": sum(not one["steps"] for one in history),
        "killed_one_rank": sum(one["one_rank"] for one in history),
        "killed_after_a_save": sum(one["saved"] for one in history),
        "tensors_in_each": len(expected),
        "tensors_that_differ": sorted(differ),
        "history": history,
    }


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200, help="kills")
    parser.add_argument("--train-iters", type=int, default=100, help="optimizer steps of a run")
    parser.add_argument("--ranks", type=int, default=2, help="processes, data parallel")
    parser.add_argument("--seed", type=int, default=1234, help="of the moments and the kinds of kill")
    parser.add_argument("--train", choices=OPTIONS, default="masks", help="what is trained")
    parser.add_argument("--json", metavar="FILE", help="write the report here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args.cycles, args.train_iters, args.ranks, args.seed, args.train, Path(folder))
    if args.json:
        write_json(args.json, report)
    print(json.dumps({key: value for key, value in report.items() if key != "history"}, indent=2))
    return 1 if report["tensors_that_differ"] else 0


if __name__ == "__main__":
    sys.exit(main())
