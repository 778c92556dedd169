"""The peak memory of `maskllm prune` on a random LLaMA of a given shape, compared with the calculation in docs/pruning.md.

    python -m benchmarks.prune_memory [--hidden 1024] [--mlp 4096] [--heads 8] [--samples 2] [--seq-length 256] [--json FILE]

It runs SparseGPT with updated weights, 2:4, in bf16. Heads are 128 wide and each has its own keys and values, as in LLaMA-2 7B
(`--hidden 4096 --mlp 11008 --heads 32`). On a GPU, PyTorch reports its peak memory. On a CPU, every allocation of PyTorch is
traced, including those inside operators; the host's share (hidden states and embedding) then counts as well.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import megatron_patches
from maskllm.files import write_json
from maskllm.pruning import PruneSettings

VOCABULARY = 64


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaMA and of the calibration data."""

    hidden: int
    mlp: int
    heads: int
    samples: int
    seq_length: int
    layers: int = 1


def account(shape: Shape) -> dict[str, int]:
    """The table in docs/pruning.md, in bytes."""
    h, f, s = shape.hidden, shape.mlp, shape.seq_length
    q = 3 * 128 * shape.heads
    weights = 2 * (q * h + h * h + 3 * f * h)
    grams = 8 * (3 * h * h + f * f)
    product = 4 * 512 * f + 4 * s * f
    activations = 2 * s * (6 * h + 4 * f)
    solve = 5 * 4 * f * f
    fit = 3 * 4 * f * f + 15 * h * f + 28 * min(1024, h) * f
    return {
        "weights": weights,
        "gram_matrices": grams,
        "calibrating": weights + grams + product + activations,
        "solving": weights + grams + solve,
        "fitting": weights + grams + fit,
        "host": shape.samples * s * (2 * h + 8) + 2 * VOCABULARY * h,
    }


def write_model(shape: Shape, folder: Path) -> None:
    """Write a random model's checkpoint FOLDER/dense and an indexed dataset of random tokens FOLDER/data."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import LlamaConfig, LlamaForCausalLM

    from maskllm.checkpoints.convert import convert

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        head_dim=128,
        max_position_embeddings=shape.seq_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        dtype=torch.bfloat16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "dense")
    builder = IndexedDatasetBuilder(str(folder / "data.bin"))
    for _ in range(shape.samples):
        builder.add_document(torch.randint(VOCABULARY, (shape.seq_length + 1,)), [shape.seq_length + 1])
    builder.finalize(str(folder / "data.idx"))


def measure(shape: Shape, folder: Path, settings: PruneSettings) -> int:
    """Prune the model in `folder`; returns the peak of the bytes allocated by PyTorch, without those allocated before."""
    from maskllm.distributed import device
    from maskllm.megatron.process_groups import parallel_processes
    from maskllm.pruning.calibration import Calibration
    from maskllm.pruning.megatron import prune_calibrated

    calibration = Calibration(str(folder / "data"), shape.samples, shape.seq_length)
    with parallel_processes():
        if device().type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            prune_calibrated(folder / "dense", folder / "pruned", settings, calibration)
            return torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            prune_calibrated(folder / "dense", folder / "pruned", settings, calibration)
    allocations = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in allocations))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    megatron_patches.import_megatron()
    shape = Shape(args.hidden, args.mlp, args.heads, args.samples, args.seq_length)
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape, Path(folder))
        measured = measure(shape, Path(folder), PruneSettings("sparsegpt", update_weights=True))
    numbers = account(shape) | {"measured": measured}
    for name, value in numbers.items():
        print(f"{name:>14}: {value / 2**20:9.1f} MiB")
    if args.json:
        write_json(args.json, {"hidden": args.hidden, "mlp": args.mlp} | numbers)


if __name__ == "__main__":
    main()
