"""Damaged stored matrices against `sparse_check`: each is refused by name, or multiplied and expanded without reading out of bounds.

    python -m benchmarks.sparse_fuzz [--cases 100000] [--seed 0] [--no-sanitizer]

The CPU operators are compiled once with AddressSanitizer and run in a process of their own. Each case takes a valid
matrix of a random layout and damages it: bits, scales, row starts, shapes, dtypes, numbers of the layout, or bytes of a safetensors
file that holds it. What passes the check runs on every instruction set in turn: expanded, it must equal the PyTorch reference; its
product with random activations, few or many, in any dtype and with or without a bias, must come near to that in fp64.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from maskllm.errors import MaskLLMError
from maskllm.patterns import Pattern

ROOT = Path(__file__).resolve().parents[1]
SELECT = """
#include "cpu/kernels.h"
namespace maskllm {  // the masked-weight kernels are not needed, and take the longest to compile
const CpuKernels kPortableKernels{}, kAvx2Kernels{}, kAvx512Kernels{};
}
extern "C" int sets() { return static_cast<int>(maskllm::instruction_sets().size()); }
extern "C" void use_set(int index) { maskllm::use_instruction_set(maskllm::instruction_sets()[index]); }
"""
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8), Pattern(5, 12), Pattern(16, 64), None]


def build(folder: Path, sanitizer: bool) -> Path:
    """The CPU operators as a library in `folder`."""
    torch_folder = Path(torch.__file__).parent
    (folder / "select.cpp").write_text(SELECT)
    flags = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fopenmp", f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem{torch_folder / path}" for path in ("include", "include/torch/csrc/api/include")]
    flags += ["-fsanitize=address", "-fno-omit-frame-pointer"] if sanitizer else []
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("sparse*.cpp")), ROOT / "csrc" / "cpu" / "kernels.cpp", folder / "select.cpp"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        subprocess.run(["g++", *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "operators.so"
    options = ["-fsanitize=address"] if sanitizer else []
    subprocess.run(
        ["g++", "-shared", *options, *objects, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(library)], check=True
    )
    return library


def a_matrix(generator: random.Random):
    """A valid stored matrix: (tensors, layout, out, in, dtype)."""
    from maskllm.ops import Layout, sparse_pack

    pattern, bits = generator.choice(PATTERNS), generator.choice((32, 16, 8, 4))
    m = pattern.m if pattern else 1
    out, in_features = generator.randint(1, 6), m * generator.randint(1, max(2, 300 // m))
    group_size = generator.choice((-1, m, 4 * m, 16 * m, 64)) if bits <= 8 else -1
    group_size = group_size if group_size % m == 0 else -1
    dtype = {32: torch.float32, 16: generator.choice((torch.bfloat16, torch.float16))}.get(bits, torch.float32)
    weight = torch.randn(out, in_features)
    if pattern is None:
        weight[torch.rand_like(weight) < generator.random()] = 0
    else:
        order = torch.rand(out, in_features // m, m).argsort(-1).argsort(-1)
        weight *= (order < pattern.n).flatten(1)
    layout = Layout(pattern, bits, group_size)
    return sparse_pack(weight.to(dtype), layout), layout, out, in_features


def flip_bits(data: torch.Tensor, generator: random.Random) -> torch.Tensor:
    """`data` with one to four bits flipped."""
    changed = data.clone()
    flat = changed.view(-1).view(torch.uint8) if changed.numel() else changed
    for _ in range(generator.randint(1, 4) if changed.numel() else 0):
        at = generator.randrange(flat.numel())
        flat[at] = int(flat[at]) ^ 1 << generator.randrange(8)
    return changed


def damage_tensor(data: torch.Tensor, generator: random.Random) -> torch.Tensor:
    """Another tensor than `data`: its bits, numbers, shape or dtype."""
    kind = generator.randrange(6)
    if kind == 0 and data.numel():
        extremes = (
            [torch.nan, torch.inf, -1.0, 0.0, 1e-45]
            if data.is_floating_point()
            else [0, 255, -1, 1 << 62, -(1 << 63), (1 << 63) - 1]
        )
        changed = data.clone()
        info = None if data.is_floating_point() else torch.iinfo(data.dtype)
        value = generator.choice(extremes)
        changed.view(-1)[generator.randrange(data.numel())] = value if info is None else max(info.min, min(info.max, value))
        return changed
    if kind == 1 and data.numel():
        dim = generator.randrange(data.dim())
        size = max(0, data.shape[dim] + generator.choice((-2, -1, 1)))
        return data.narrow(dim, 0, size).clone() if size <= data.shape[dim] else torch.cat([data, data.narrow(dim, 0, 1)], dim)
    if kind == 2 and data.element_size() == 1:
        return data.view(torch.int8 if data.dtype == torch.uint8 else torch.uint8)
    if kind == 3:
        return data.flatten() if generator.random() < 0.5 else data.unsqueeze(0)
    if kind == 4 and data.numel():
        return data.flatten()[torch.randperm(data.numel())].view(data.shape)
    return flip_bits(data, generator)


def damage_file(tensors: dict[str, torch.Tensor], generator: random.Random) -> dict[str, torch.Tensor] | None:
    """The tensors of a damaged safetensors file, or None if safetensors refuses it."""
    content = bytearray(safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}))
    if generator.random() < 0.3:
        del content[generator.randrange(len(content)) :]
    for _ in range(generator.randint(1, 3) if content else 0):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    try:
        return safetensors.torch.load(bytes(content))
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, MemoryError, UnicodeDecodeError):
        return None


def one_case(generator: random.Random) -> str:
    """Damages a matrix. Returns what became of it: "refused file", "refused" or "passed"."""
    from maskllm.ops import Layout, sparse_check, sparse_expand, sparse_linear
    from maskllm.ops import sparse_reference as reference
    from maskllm.ops.sparse_linear import TENSORS

    tensors, layout, out, in_features = a_matrix(generator)
    kind = generator.randrange(4)
    if kind == 0:
        damaged = damage_file(tensors, generator)
        if damaged is None:
            return "refused file"
        tensors = damaged
    elif kind == 1:
        out = max(0, out + generator.choice((-1, 0, 1)))
        in_features += generator.choice((-4, 0, 1, 4, 8, 1 << 31, 1 << 62, -(1 << 63)))
    elif kind == 2:
        pattern = generator.choice(PATTERNS)
        try:
            layout = Layout(pattern, generator.choice((32, 16, 8, 4)), generator.choice((-1, 4, 64, 1 << 62)))
        except MaskLLMError:
            return "refused"
    else:
        for _ in range(generator.randint(1, 2)):
            key = generator.choice(sorted(tensors))
            tensors = tensors | {key: damage_tensor(tensors[key], generator)}
            if generator.random() < 0.02:
                tensors.pop(key)
    try:
        sparse_check(tensors, layout, out, in_features, "w")
    except MaskLLMError as error:
        assert str(error).startswith("w"), error
        return "refused"
    stored = [tensors.get(key) for key in TENSORS]
    assert reference.first_fault(*stored, in_features, layout.numbers)[0] == reference.FINE
    dtype = generator.choice((torch.float32, torch.bfloat16, torch.bfloat16, torch.float16))
    dense = reference.expand(*stored, in_features, layout.numbers, torch.float32)
    expected = dense.to(dtype)
    expanded = sparse_expand(tensors, layout, in_features, dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    same = expanded.view(bits) == expected.view(bits) if expanded.numel() else torch.tensor(True)
    assert bool((same | (expanded.isnan() & expected.isnan())).all())  # a NaN's bits may differ
    data = torch.randn(generator.choice((1, 1, 3, 8, 17, 40, 70)), in_features).to(dtype)
    bias = torch.randn(out).to(dtype) if generator.random() < 0.5 else None
    found = sparse_linear(data, tensors, layout, bias)
    # Rows with damaged values may overflow; of the others, activations may have 8 bits, and weights and results those of bf16.
    tame = (dense.abs() < 1e3).all(1)
    wanted = data.double() @ dense[tame].double().T + (0 if bias is None else bias[tame].double())
    bound = 0.02 * (data.abs().amax(1, keepdim=True).double() if in_features else 0) * dense[tame].abs().sum(1).double() + 0.02
    assert bool(((found[:, tame].double() - wanted).abs() <= bound).all())
    return "passed"


def run(library: str, cases: int, seed: int) -> None:
    """The process under the sanitizer."""
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "maskllm.ops._kernels" else find(name, *rest)
    import maskllm.ops  # noqa: F401  (defines the operators)

    torch.ops.load_library(library)
    handle = ctypes.CDLL(library)
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    start = time.perf_counter()
    for case in range(cases):
        handle.use_set(case % handle.sets())
        torch.manual_seed(seed + case)
        try:
            found[one_case(random.Random(seed + case))] += 1
        except Exception:
            print(f"case {seed + case}", file=sys.stderr)
            raise
    print(f"{cases} cases from seed {seed} in {time.perf_counter() - start:.0f} s, {handle.sets()} instruction sets: {dict(found)}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-sanitizer", action="store_true", help="compile without AddressSanitizer")
    parser.add_argument("--library", help=argparse.SUPPRESS)  # the process under the sanitizer
    args = parser.parse_args(argv)
    if args.library:
        return run(args.library, args.cases, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder), not args.no_sanitizer)
        # C++ exceptions need the C++ library to be loaded as early as the sanitizer.
        ask = [["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
        runtime = " ".join(subprocess.run(each, capture_output=True, text=True, check=True).stdout.strip() for each in ask)
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
        if not args.no_sanitizer:
            environment["LD_PRELOAD"] = runtime
        command = [sys.executable, __file__, "--library", str(library), "--cases", str(args.cases), "--seed", str(args.seed)]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
