"""The time of pruning: SparseGPT's solve against algorithm 1 as written, and each method against the dense forward passes.

    python -m benchmarks.prune --hf DIR [--samples 128] [--seq-length 512] [--layers 30] [--json FILE]

DIR is a Hugging Face checkpoint of a LLaMA-like model. It is pruned in memory, in fp32 on a CPU and bf16 on a GPU. Tokens are
random, since times do not depend on them.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.machine import describe, wall_clock
from maskllm.files import write_json
from maskllm.patterns import Pattern
from maskllm.pruning import METHODS, PruneSettings, factor_hessian, prune_hf, sparsegpt
from maskllm.pruning.sparsegpt import BLOCK_SIZE

PATTERN = Pattern(2, 4)


def algorithm_1(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """SparseGPT's algorithm 1 as the paper writes it (arXiv 2301.00774): one matrix, one column at a time, contiguous rows."""
    weight = weight.float().clone()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:end])
        for j in range(start, end):
            if j % PATTERN.m == 0:
                scores = weight[:, j : j + PATTERN.m] ** 2 / inverse.diagonal()[j : j + PATTERN.m] ** 2
                removed.scatter_(1, j + scores.topk(PATTERN.m - PATTERN.n, dim=1, largest=False).indices, True)
            errors[:, j - start] = torch.where(removed[:, j], weight[:, j], 0) / inverse[j, j]
            weight[:, j:end] -= errors[:, j - start, None] * inverse[j, j:end]
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight.masked_fill_(removed, 0)


def time_solve(model: PreTrainedModel, device: torch.device) -> dict[str, float]:
    """The seconds to solve all matrices of one layer: ours, which solves matrices with the same input together, and algorithm 1."""
    layer = model.model.layers[0]
    groups = [
        [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
        [layer.self_attn.o_proj],
        [layer.mlp.gate_proj, layer.mlp.up_proj],
        [layer.mlp.down_proj],
    ]
    seconds = {"ours": 0.0, "algorithm_1": 0.0}
    for group in groups:
        width = group[0].in_features
        inputs = torch.randn(2 * width, width, device=device)
        hessian = 2 * inputs.t() @ inputs
        weights = [linear.weight.detach() for linear in group]
        started = wall_clock(device.type)
        sparsegpt(torch.cat(weights), factor_hessian(hessian.clone(), "layer"), PATTERN)
        between = wall_clock(device.type)
        for weight in weights:
            algorithm_1(weight, hessian)
        seconds["ours"] += between - started
        seconds["algorithm_1"] += wall_clock(device.type) - between
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, metavar="DIR")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--layers", type=int, help="number of layers to use; default: all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sequential", action="store_true", help="skip pruning that is not sequential")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    model = model.to(device).eval()
    if args.layers is not None:
        model.model.layers = model.model.layers[: args.layers]
    layers = len(model.model.layers)
    tokens = torch.randint(0, model.config.vocab_size, (args.samples, args.seq_length), generator=torch.Generator().manual_seed(0))
    machine = describe()
    print(f"{machine}; {layers} layers, {args.samples} x {args.seq_length} tokens")
    numbers: dict[str, Any] = {"layers": layers, "samples": args.samples, "seq_length": args.seq_length}

    time_solve(model, device)  # warm up
    solve = time_solve(model, device)
    numbers["solve_seconds"] = {name: seconds * layers for name, seconds in solve.items()}
    print(
        f"SparseGPT's solve of {7 * layers} matrices: {solve['ours'] * layers:.1f} s; algorithm 1 as written "
        f"{solve['algorithm_1'] * layers:.1f} s, ratio {solve['algorithm_1'] / solve['ours']:.1f}"
    )

    started, processor_started = wall_clock(device.type), time.process_time()
    with torch.no_grad():
        for ids in tqdm(tokens.to(device).split(1), desc="dense forward passes", leave=False):
            model.base_model(ids, use_cache=False)
    dense, processor_dense = wall_clock(device.type) - started, time.process_time() - processor_started
    numbers["dense_forward_seconds"], numbers["dense_forward_processor_seconds"] = dense, processor_dense
    print(f"dense forward passes alone: {dense:.1f} s, {processor_dense:.1f} s of processor time", flush=True)
    numbers["prune"] = {}
    for method in args.methods:
        for sequential in (True,) if args.sequential else (True, False):
            pruned = copy.deepcopy(model)
            started, processor_started = wall_clock(device.type), time.process_time()
            report = prune_hf(pruned, tokens, PruneSettings(method, PATTERN, sequential=sequential)).report
            total, processor_total = wall_clock(device.type) - started, time.process_time() - processor_started
            solving = sum(layer["solve_seconds"] for layer in report["layers"])
            name = f"{method}{'' if sequential else ', not sequential'}"
            numbers["prune"][name] = {
                "seconds": total,
                "solve_seconds": solving,
                "ratio": total / dense,
                "processor_ratio": processor_total / processor_dense,
            }
            print(
                f"{name}: {total:.1f} s ({solving:.1f} s of it solving), {total / dense:.2f} times the dense forward passes, "
                f"{processor_total / processor_dense:.2f} times in processor time",
                flush=True,
            )
    numbers["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        numbers["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    if args.json:
        write_json(args.json, numbers)


if __name__ == "__main__":
    main()
