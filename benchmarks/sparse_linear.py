"""Products with matrices stored without their zeros against torch's dense ones, on a CPU or a CUDA GPU.

    python -m benchmarks.sparse_linear [--device cpu|cuda] [--rows 1 2 4 ...] [--seconds 2] [--shape 11008 4096] [--processor-time]
        [--json FILE]

On a CPU: first one row times an 11008 x 4096 matrix, then a larger and larger number of rows. The matrix is cut into eight parts of 1376
rows (into halves from 65 rows of activations on), and a call multiplies one of them: the shorter a call, the likelier is one that no
other program interrupts. Each contender cycles through so many parts that none of them is in the cache. The contenders take turns, and
the shortest time of each counts, times the number of parts, since other programs can only make one longer. Beside the times stand the
bytes of weights a second as a share of what a plain loop reads, and the bytes a second with 160 rows of weights in the second-level
cache, which is the loop's own limit. Needs g++ for dense_loops.cpp.

On a GPU: whole matrices, each contender in so many copies that none is in the cache. A call is one of CALLS in a row, so that starting
it takes no time of its own. The bytes of weights a second are a share of what a copy reads and writes.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import machine
from maskllm.files import write_json
from maskllm.ops import Layout, sparse_linear, sparse_pack
from maskllm.ops.extension import kernels
from maskllm.patterns import Pattern

PARTS = 8
CALLS = 20
ROWS = [1, 2, 4, 8, 16, 17, 32, 64, 128, 256, 512, 1024, 2048]
LAYOUTS = {
    "2:4 bf16": Layout(Pattern(2, 4), 16),
    "2:4 int8": Layout(Pattern(2, 4), 8),
    "2:4 int4, groups of 128": Layout(Pattern(2, 4), 4, 128),
    "1:4 bf16": Layout(Pattern(1, 4), 16),
    "1:4 int8": Layout(Pattern(1, 4), 8),
}


def loops() -> ctypes.CDLL:
    """The compiled loops of dense_loops.cpp. They use the OpenMP runtime that torch has loaded."""
    path = Path(tempfile.mkdtemp()) / "dense_loops.so"
    source = Path(__file__).with_name("dense_loops.cpp")
    flags = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fPIC", "-c"]
    subprocess.run(["g++", *flags, str(source), "-o", str(path.with_suffix(".o"))], check=True)
    subprocess.run(["g++", "-shared", str(path.with_suffix(".o")), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def kept(pattern: Pattern, out: int, inputs: int) -> torch.Tensor:
    """A random matrix in fp32 that keeps N of every M."""
    weight = torch.randn(out, inputs)
    order = torch.rand(out, inputs // pattern.m, pattern.m).argsort(-1).argsort(-1)
    return weight * (order < pattern.n).flatten(1)


class Contender:
    """A product with the same matrix `copies` times in different memory. Call it for the next copy."""

    def __init__(self, tensors: list[torch.Tensor], product: Callable[..., object], copies: int) -> None:
        self.bytes = sum(tensor.nbytes for tensor in tensors)
        self.sets = [tensors] + [[tensor.clone() for tensor in tensors] for _ in range(copies - 1)]
        self.product = product
        self.turn = itertools.cycle(self.sets)
        self.best = float("inf")

    def measure(self, clock: Callable[[], float]) -> None:
        tensors = next(self.turn)
        start = clock()
        self.product(*tensors)
        self.best = min(self.best, clock() - start)


def measure(contenders: dict[str, Contender], seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """The shortest time of each contender. They take turns for `seconds` times their number."""
    for contender in contenders.values():
        contender.measure(clock)
        contender.best = float("inf")
    end = time.perf_counter() + seconds * len(contenders)
    while time.perf_counter() < end or any(contender.best == float("inf") for contender in contenders.values()):
        for contender in contenders.values():
            contender.measure(clock)
    return {name: contender.best for name, contender in contenders.items()}


def dense_int8(library: ctypes.CDLL, weight: torch.Tensor, data: torch.Tensor) -> tuple[list[torch.Tensor], Callable[..., object]]:
    """The dense int8 loop's tensors and product, checked against torch."""
    row_scales = weight.abs().amax(1) / 127
    numbers = (weight / row_scales[:, None]).round().to(torch.int8)
    blocks = data.view(-1, 128)
    scales = blocks.abs().amax(1) / 127
    inputs = ((blocks / scales[:, None]).round() + 128).to(torch.uint8).flatten()
    result = torch.empty(len(weight))

    def product(matrix: torch.Tensor) -> torch.Tensor:
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in (matrix, inputs, scales, row_scales)]
        library.dense_int8(
            *pointers, ctypes.c_int64(len(matrix)), ctypes.c_int64(matrix.shape[1]), ctypes.c_void_p(result.data_ptr())
        )
        return result

    exact = (numbers.double() * row_scales.double()[:, None]) @ ((inputs.double() - 128).view(-1, 128) * scales[:, None]).flatten()
    assert (product(numbers) - exact).abs().max() < 1e-3 * exact.abs().max()
    return [numbers], product


def stored(layout: Layout, weight: torch.Tensor, data: torch.Tensor) -> tuple[list[torch.Tensor], Callable[..., object]]:
    """A stored matrix's tensors and product."""
    tensors = sparse_pack(weight.bfloat16() if layout.bits == 16 else weight, layout)
    return list(tensors.values()), lambda *each: sparse_linear(data, dict(zip(tensors, each, strict=True)), layout)


def one_row(
    library: ctypes.CDLL, out: int, columns: int, cached: bool, seconds: float, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Time and bytes of each contender for one row and an `out` x `columns` matrix, from memory or from the cache."""
    data = torch.randn(1, columns)
    half = data.bfloat16()
    linear = torch.nn.functional.linear
    weight = kept(Pattern(2, 4), out, columns)
    quarter = kept(Pattern(1, 4), out, columns)
    library.read_words.restype = ctypes.c_uint64
    read = lambda each: library.read_words(ctypes.c_void_p(each.data_ptr()), ctypes.c_int64(each.nbytes // 8))  # noqa: E731
    parts = {
        "dense bf16 (torch)": ([weight.bfloat16()], lambda each: linear(half, each)),
        "dense fp32 (torch)": ([weight], lambda each: linear(data, each)),
        "dense int8 (VNNI loop)": dense_int8(library, weight, data),
        **{name: stored(layout, weight if layout.pattern.n == 2 else quarter, half) for name, layout in LAYOUTS.items()},
        "read": ([torch.ones(out * columns, dtype=torch.uint8)], read),
    }
    contenders = {}
    for name, (tensors, product) in parts.items():
        size = sum(each.nbytes for each in tensors)
        contenders[name] = Contender(tensors, product, 1 if cached else -(-4 * machine.cache_bytes() // size))
    times = measure(contenders, seconds, clock)
    return {name: {"seconds": times[name], "bytes": contenders[name].bytes} for name in contenders}


def many_rows(rows: list[int], out: int, columns: int, seconds: float, clock: Callable[[], float]) -> list[dict]:
    """The time of torch's dense product over each stored layout's, by number of rows."""
    found = []
    for count in rows:
        parts_of_matrix = PARTS if count <= 64 else 2
        weight = kept(Pattern(2, 4), out // parts_of_matrix, columns)
        half = torch.randn(count, columns).bfloat16()
        parts = {"dense": ([weight.bfloat16()], lambda each, half=half: torch.nn.functional.linear(half, each))}
        parts |= {name: stored(layout, weight, half) for name, layout in LAYOUTS.items() if layout.pattern.n == 2}
        contenders = {name: Contender(*part, copies=12 if count <= 64 else 2) for name, part in parts.items()}
        times = {name: parts_of_matrix * each for name, each in measure(contenders, seconds, clock).items()}
        found.append({"rows": count, "seconds": times, "ratio": {name: times["dense"] / times[name] for name in times}})
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found[-1]["ratio"].items() if name != "dense")
        print(f"  {count:5} rows: dense {times['dense'] * 1e3:8.2f} ms; dense over {ratios}", flush=True)
    return found


def on_gpu(device: str, rows: list[int], out: int, columns: int, seconds: float) -> dict:
    """Times of torch's dense bf16 and of each stored layout by rows of activations, and the bandwidth of a copy."""
    bandwidth = machine.copy_bandwidth(device, time.perf_counter)
    print(f"{out} x {columns}, bf16 inputs; a copy reads and writes {bandwidth / 1e9:.0f} GB/s")
    weights = {n: kept(Pattern(n, 4), out, columns) for n in (2, 1)}
    dense = weights[2].bfloat16().to(device)
    found = []
    for count in rows:
        data = torch.randn(count, columns).bfloat16().to(device)
        parts = {"dense bf16 (torch)": ([dense], lambda each, data=data: torch.nn.functional.linear(data, each))}
        for name, layout in LAYOUTS.items():
            tensors, product = stored(layout, weights[layout.pattern.n], data)
            parts[name] = ([tensor.to(device) for tensor in tensors], product)
        row: dict = {"rows": count, "seconds": {}, "share_of_copy": {}}
        for name, (tensors, product) in parts.items():
            size = sum(tensor.nbytes for tensor in tensors)
            contender = Contender(tensors, product, -(-4 * machine.cache_bytes(device) // size))
            row["seconds"][name] = several_calls(contender, device, seconds)
            row["share_of_copy"][name] = size / row["seconds"][name] / bandwidth
        found.append(row)
        times = row["seconds"]
        ratios = ", ".join(f"{name} {times['dense bf16 (torch)'] / times[name]:.2f}" for name in LAYOUTS)
        print(f"  {count:5} rows: dense {1e6 * times['dense bf16 (torch)']:8.1f} us; dense over {ratios}", flush=True)
    return {"copy_bytes_a_second": bandwidth, "rows": found}


def several_calls(contender: Contender, device: str, seconds: float) -> float:
    """The shortest time of a call, as one of CALLS."""
    best, end = float("inf"), time.perf_counter() + seconds
    contender.product(*contender.sets[0])  # finds the fastest product of many rows
    while time.perf_counter() < end or best == float("inf"):
        start = machine.wall_clock(device)
        for _ in range(CALLS):
            contender.product(*next(contender.turn))
        best = min(best, (machine.wall_clock(device) - start) / CALLS)
    return best


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--shape", type=int, nargs=2, default=(11008, 4096), metavar=("OUT", "IN"), help="of the matrix")
    parser.add_argument("--seconds", type=float, default=2.0, help="the time for each contender")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor seconds of all threads, which do not include other programs; for one thread (OMP_NUM_THREADS=1)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    if args.device == "cuda":
        print(machine.describe())
        result = on_gpu(args.device, args.rows, *args.shape, args.seconds)
        if args.json:
            write_json(args.json, result)
        return
    library = loops()
    print(f"{machine.describe()} ({kernels().instruction_set()}), load {os.getloadavg()[0]:.1f}")
    clock = time.process_time if args.processor_time else time.perf_counter
    out, columns = args.shape
    memory = one_row(library, out // PARTS, columns, False, args.seconds, clock)
    # A call of few rows takes as long as everything but the loop.
    few, more = (one_row(library, count, columns, True, args.seconds / 4, clock) for count in (4, 164))
    cache = {name: {key: more[name][key] - few[name][key] for key in more[name]} for name in more}
    memory = {name: {key: PARTS * value for key, value in each.items()} for name, each in memory.items()}
    bandwidth = memory["read"]["bytes"] / memory["read"]["seconds"]
    dense = memory["dense bf16 (torch)"]["seconds"]
    print(f"one row, {out} x {columns}; a plain loop reads {bandwidth / 1e9:.1f} GB/s")
    print(f"  {'':26} {'ms':>8} {'GB/s':>6} {'of read':>8} {'in cache, GB/s':>15} {'bf16 over it':>13}")
    for name, each in memory.items():
        speed, ceiling = (found[name]["bytes"] / found[name]["seconds"] for found in (memory, cache))
        each |= {"bytes_a_second": speed, "share_of_read": speed / bandwidth, "in_cache_bytes_a_second": ceiling}
        ratio = f"{dense / each['seconds']:13.2f}" if name != "read" else ""
        print(f"  {name:26} {each['seconds'] * 1e3:8.3f} {speed / 1e9:6.1f} {speed / bandwidth:8.0%} {ceiling / 1e9:15.1f} {ratio}")
    by_int8 = memory["dense int8 (VNNI loop)"]["seconds"] / memory["2:4 int8"]["seconds"]
    print(f"  2:4 int8 over dense int8: {by_int8:.2f}")
    print(f"rows, {out} x {columns}, bf16 inputs, against torch's bf16")
    result = {
        "instruction_set": kernels().instruction_set(),
        "one_row": memory,
        "int8_over_dense_int8": by_int8,
        "clock": clock.__name__,
        "rows": many_rows(args.rows, out, columns, args.seconds, clock),
    }
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
