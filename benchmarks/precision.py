"""How low precision, and one draw per step, change what is learned: a short run with each option, and the same run with another
seed.

    python -m benchmarks.precision --hf DIR --corpus FILE... [--layers 6] [--train-iters 20] [--global-batch-size 4]
        [--seq-length 256] [--rows I...] [--json FILE]

The first layers of a Hugging Face model start from a magnitude prior and learn on the corpus (C4 JSON lines). Each row is one run
of `maskllm.train` with one sequence per micro-batch. It shows the validation loss with the winners, and the share of mask entries
that equal the first row's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import megatron_patches

megatron_patches.import_megatron()

from maskllm.checkpoints.reading import resolve  # noqa: E402
from maskllm.cli import main as maskllm  # noqa: E402
from maskllm.files import write_json  # noqa: E402
from maskllm.ops import winner_mask  # noqa: E402
from maskllm.patterns import Pattern  # noqa: E402

ROWS: list[list[str]] = [
    [],
    ["--seed", "2"],
    ["--optimizer-state-dtype", "bf16"],
    ["--optimizer-state-dtype", "8bit"],
    ["--mask-logits-dtype", "bf16"],
    ["--mask-logits-dtype", "bf16", "--optimizer-state-dtype", "8bit"],
    ["--mask-sample-interval", "step"],
]
PATTERN = Pattern(2, 4)


def make_inputs(hf: str, corpus: list[str], layers: int, folder: Path) -> tuple[Path, Path]:
    """The pruned checkpoint of the model's first layers, and the prefix of the dataset."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(hf)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder / "hf")
    AutoTokenizer.from_pretrained(hf).save_pretrained(folder / "hf")
    pruned, prefix = folder / "pruned", folder / "data"
    for words in (
        ["convert", "--hf", folder / "hf", "--output", folder / "dense"],
        ["prune", "--load", folder / "dense", "--output", pruned, "--method", "magnitude", "--pattern", PATTERN],
        ["preprocess", "--input", *corpus, "--output-prefix", prefix, "--tokenizer", folder / "hf", "--append-eod"],
    ):
        if status := maskllm(list(map(str, words))):
            raise SystemExit(status)
    return pruned, prefix.with_name("data_text_document")


def learn(pruned: Path, data: Path, save: Path, iterations: int, sizes: list[object], options: list[str]) -> float:
    """Train; returns the last validation loss with the winners."""
    command = [
        sys.executable, "-m", "maskllm.train", "--pretrained-checkpoint", pruned, "--data-path", data, "--save", save, "--seed", 1,
        "--train-iters", iterations, *sizes, "--lr", 2e-3, "--min-lr", 2e-4, "--params-dtype",
        "fp32", "--log-interval", 1, "--eval-interval", iterations, "--split", "90,10,0", *options,
    ]  # fmt: skip
    log = save.with_suffix(".log")
    with log.open("w") as file:
        if subprocess.run(list(map(str, command)), stdout=file, stderr=file, env=os.environ).returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{log.read_text()[-3000:]}")
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line["loss_winner"] for line in lines if "loss_winner" in line][-1]


def winners(save: Path) -> torch.Tensor:
    """The entries of all learned masks, bool [entries]."""
    tensors = resolve(save).tensors
    keys = sorted(key for key in tensors if key.endswith("mask_logits") and not key.startswith("optimizer"))
    return torch.cat([winner_mask(tensors[key].load().float(), PATTERN).flatten() for key in keys])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR")
    parser.add_argument("--corpus", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--train-iters", type=int, default=20)
    parser.add_argument("--global-batch-size", type=int, default=4, help="micro-batches per step")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=list(range(len(ROWS))),
        metavar="I",
        help=f"indices into {ROWS}; the others are compared with the first",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pruned, data = make_inputs(args.hf, args.corpus, args.layers, folder)
        first: torch.Tensor | None = None
        batch = args.global_batch_size
        sizes = ["--global-batch-size", batch, "--seq-length", args.seq_length, "--eval-iters", max(1, 16 // batch)]
        for number in tqdm(args.rows, desc="runs"):
            save, options = folder / f"run{number}", ROWS[number]
            loss = learn(pruned, data, save, args.train_iters, sizes, options)
            masks = winners(save)
            first = masks if first is None else first
            rows.append({"options": options, "loss_winner": loss, "masks_equal": float((masks == first).double().mean())})
    for row in rows:
        print(f"{row['loss_winner']:.3f}  {row['masks_equal']:.1%}  {' '.join(row['options']) or '(none)'}")
    if args.json:
        settings = {name: getattr(args, name) for name in ("layers", "train_iters", "global_batch_size", "seq_length")}
        write_json(args.json, settings | {"rows": rows})


if __name__ == "__main__":
    main()
