"""How fast encoder-decoder and other models run with compressed weights: speech, translation and text, beside the dense model.

    python -m benchmarks.compressed_tasks --model DIR --work DIR [--patterns P...] [--bits B...] [--json FILE]
    python -m benchmarks.compressed_tasks --random t5-small --work DIR

The dense weights are pruned to each pattern by magnitude, which is enough to measure time, and stored by `maskllm compress`. Then
`maskllm benchmark` measures the dense and all compressed models in one run, each in a process of its own. `--random` takes a model of a
known shape with random weights. Models are kept in `--work`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, MptConfig, MptForCausalLM, T5Config, T5ForConditionalGeneration

from benchmarks.models import compress, keep, made, write_word_tokenizer
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_json
from maskllm.huggingface.blocks import block_linears, matrix
from maskllm.huggingface.loading import load_hf_model
from maskllm.inference.benchmark import model_class_of
from maskllm.patterns import Pattern

RANDOM = {
    "t5-small": lambda: T5ForConditionalGeneration(T5Config(decoder_start_token_id=0)),
    "mpt-1b": lambda: MptForCausalLM(MptConfig(d_model=2048, n_heads=16, n_layers=24, vocab_size=50368)),
}
"""Models with random weights, by the name of the published model that has their shape."""


def write_random(name: str, directory: Path) -> None:
    """Write a model of `RANDOM` in bf16, with a tokenizer."""
    torch.manual_seed(0)
    model = RANDOM[name]().to(torch.bfloat16)
    model.save_pretrained(directory)
    write_word_tokenizer(directory, model.config.vocab_size)


def write_sparse(dense: Path, pattern: Pattern, directory: Path) -> None:
    """Write the dense model with the zeros of a pattern in its blocks' matrices, and its other files."""
    model = load_hf_model(dense, dtype=torch.float32, device=torch.device("cpu"), model_class=model_class_of(dense))
    with torch.no_grad():
        for linear in block_linears(model).values():
            weight = matrix(linear).contiguous()
            keep(weight, pattern)
            matrix(linear).copy_(weight)
    model.to(AutoConfig.from_pretrained(dense).dtype or torch.float32).save_pretrained(directory)
    for file in dense.iterdir():
        if not (directory / file.name).exists() and file.suffix in (".json", ".model", ".txt"):
            (directory / file.name).write_bytes(file.read_bytes())


def main(argv: Sequence[str] | None = None) -> None:
    """Make the models, measure them in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, metavar="DIR", help="dense model")
    which.add_argument("--random", choices=list(RANDOM), help="shape of a dense model with random weights")
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="folder for the models, which are kept")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4", "16:64"], metavar="P", help="default: 2:4 1:4 16:64")
    parser.add_argument("--bits", nargs="+", type=int, default=[16, 8], metavar="B", help="of the stored values; default: 16 8")
    parser.add_argument("--prompt-tokens", default=32, metavar="N", help="tokens to read; default: %(default)s")
    parser.add_argument("--new-tokens", default=32, metavar="N", help="tokens to write; default: %(default)s")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="times that each model is measured; default: %(default)s"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    arguments = parser.parse_args(argv)
    name = arguments.random or arguments.model.name
    work = arguments.work / name
    work.mkdir(parents=True, exist_ok=True)
    dense = arguments.model or made(work / "dense", lambda path: write_random(arguments.random, path))
    models = {"dense": dense}
    for text in arguments.patterns:
        pattern = Pattern.parse(text)
        sparse = made(work / text.replace(":", "-"), lambda path, pattern=pattern: write_sparse(dense, pattern, path))
        for bits in arguments.bits:
            models[f"{text}, {bits} bits"] = made(
                work / f"{sparse.name}-{bits}", lambda path, sparse=sparse, bits=bits: compress(sparse, bits, path)
            )
    rows: dict[str, list[dict[str, Any]]] = {label: [] for label in models}
    output = work / "benchmark.json"
    for _ in range(arguments.rounds):
        first, *others = models.values()
        words = [sys.executable, "-m", "maskllm", "benchmark", "--model", first, "--against", *others, "--json", output]
        words += ["--device", "cpu", "--prompt-tokens", arguments.prompt_tokens, "--new-tokens", arguments.new_tokens]
        subprocess.run(list(map(str, words)), check=True)
        found = read_json_object(output)
        for label, result in zip(models, found["results"], strict=True):
            rows[label].append(result)
    if arguments.json:
        write_json(arguments.json, {"model": name, "settings": found["settings"], "rows": rows})


if __name__ == "__main__":
    sys.exit(run_guarded("compressed_tasks", main))
