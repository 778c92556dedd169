"""Speed of 2:4 layers against dense layers on a CUDA GPU, by number of tokens; and of 2:4 compression on any device.

python -m benchmarks.compress24 [--device cpu|cuda] [--size 4096] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from maskllm.files import write_json
from maskllm.ops import Sparse24Linear, compress24, decompress24

# (out, in) of the linear layers of LLaMA 7B and 70B.
LAYERS = {
    "7b qkv": (12288, 4096),
    "7b o": (4096, 4096),
    "7b gate+up": (22016, 4096),
    "7b down": (4096, 11008),
    "70b qkv": (10240, 8192),
    "70b o": (8192, 8192),
    "70b gate+up": (57344, 8192),
    "70b down": (8192, 28672),
}
TOKENS = [1, 16, 64, 256, 1024, 2048, 4096, 8192]


def sparse_weight(out: int, inputs: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """A random 2:4 matrix that keeps the two largest values of every four."""
    blocks = torch.randn(out, inputs // 4, 4, device=device)
    kept = blocks.abs().argsort(-1).argsort(-1) >= 2
    return (blocks * kept).flatten(1).to(dtype)


def seconds(work: Callable[[], object], device: str, repeats: int = 20) -> float:
    """The median of `repeats` timings after two warm-up runs. CUDA events measure on a GPU."""
    work(), work()
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2]


def layer_speedups(name: str, out: int, inputs: int) -> list[dict]:
    """The times of a dense and a 2:4 layer in bf16 for each number of tokens."""
    weight = sparse_weight(out, inputs, "cuda", torch.bfloat16)
    sparse = Sparse24Linear(weight, name=name)
    rows = []
    for tokens in TOKENS:
        data = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
        sparse.tune(tokens)
        dense_time = seconds(lambda data=data: torch.nn.functional.linear(data, weight), "cuda")
        sparse_time = seconds(lambda data=data: sparse(data), "cuda")
        rows.append(
            {"layer": name, "tokens": tokens, "dense": dense_time, "sparse": sparse_time, "speedup": dense_time / sparse_time}
        )
    return rows


def compression(device: str, size: int) -> dict:
    """The times to compress, restore and clone a square bf16 matrix."""
    weight = sparse_weight(size, size, device, torch.bfloat16)
    values, metadata = compress24(weight)
    assert torch.equal(decompress24(values, metadata), weight)
    return {
        "compress": seconds(lambda: compress24(weight), device),
        "decompress": seconds(lambda: decompress24(values, metadata), device),
        "clone": seconds(weight.clone, device),
        "bytes_of_dense": (values.nbytes + metadata.nbytes) / weight.nbytes,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the matrix to compress")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    result: dict = {"size": args.size, "compression": compression(args.device, args.size), "layers": []}
    times = result["compression"]
    print(
        f"{args.size} x {args.size} bf16 on {args.device}: compress {times['compress'] * 1e3:.2f} ms, "
        f"decompress {times['decompress'] * 1e3:.2f} ms, clone {times['clone'] * 1e3:.2f} ms; compressed to {times['bytes_of_dense']:.1%}"
    )
    if args.device == "cuda":
        for name, (out, inputs) in LAYERS.items():
            rows = layer_speedups(name, out, inputs)
            result["layers"] += rows
            faster = next((row["tokens"] for row in rows if row["speedup"] > 1), None)
            speedups = ", ".join(f"{row['tokens']}: {row['speedup']:.2f}" for row in rows)
            print(f"{name:12} speed-up over dense by tokens: {speedups}; faster from {faster} tokens")
    else:
        print("2:4 layers: not run, since they need a CUDA GPU")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
