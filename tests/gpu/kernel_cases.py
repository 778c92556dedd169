"""What the CUDA kernels must do: one list of cases for a GPU and for the CPU.

`CASES` maps a name to a function of a `Backend`. tests/gpu/test_kernels.py runs them on a GPU. Without one, it builds the kernels for
the CPU (tests/gpu/cuda_on_cpu) and runs this module in a process of its own, which AddressSanitizer watches:

    python -m tests.gpu.kernel_cases LIBRARY [CASE ...]
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from maskllm.ops import Layout, NoiseKey, ShardMap, philox_key, reference, sparse_pack
from maskllm.ops import sparse_reference as stored_reference
from maskllm.patterns import Pattern
from tests.gradients import TOLERANCE, logits_gradient_error
from tests.ops.test_sparse_linear import ALL_LAYOUTS, DTYPES, FAULTS, assert_near, columns, matrix, stored

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS = (
    "masked_weight",
    "masked_weight_backward",
    "rounding",
    "winner_bits",
    "first_violation",
    "compress24",
    "decompress24",
    "sparse_linear",
    "sparse_expand",
    "sparse_check",
)
CPU: Any = torch.ops.maskllm
"""The operators on the CPU."""


@dataclass(frozen=True)
class Backend:
    """The kernels under test: their operators, and the device of the tensors that they take."""

    ops: Any
    device: torch.device

    def on(self, tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
        """`tensor` on the device, in memory that ends with it. It begins `offset` elements after a whole number of cache lines."""
        memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=self.device)
        memory[offset:] = tensor.flatten().to(self.device)
        return memory[offset:].view(tensor.shape)


CASES: dict[str, Callable[[Backend], None]] = {}


def case(function: Callable[[Backend], None]) -> Callable[[Backend], None]:
    """Add a function to the cases."""
    CASES[function.__name__] = function
    return function


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    found, wanted = found.cpu(), wanted.cpu()
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return False
    return torch.equal(found.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8))


def assert_close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Check the largest difference relative to the largest wanted entry."""
    found, wanted = found.cpu().double(), wanted.cpu().double()
    assert torch.isfinite(found).all()
    if found.numel():
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def masked_weights(backend: Backend, pattern: str, out: int, blocks: int, offset: int = 0) -> None:
    """The masked weight and its gradients against the reference in fp64 and against the CPU's, in every dtype."""
    pattern = Pattern.parse(pattern)
    key = NoiseKey(philox_key(0, "layer"), 1 << 33, ShardMap(blocks + 5, 2, 1, 3, 40))
    numbers = (pattern.n, pattern.m, key.signed_key, key.sample, key.shard.numbers())
    generator = torch.Generator().manual_seed(out * blocks)
    for number, (dtype, hard) in enumerate(itertools.product(FLOATS, (False, True))):
        logits_dtype, accumulate = FLOATS[number % 2], number % 3 == 0
        weight = torch.randn(out, blocks * pattern.m, generator=generator).to(dtype)
        logits = torch.randn(out, blocks, pattern.num_candidates, generator=generator).to(logits_dtype)
        grad = torch.randn(out, blocks * pattern.m, generator=generator).to(dtype)
        before = torch.randn(logits.shape, generator=generator) if accumulate else torch.full(logits.shape, torch.nan)
        draw = (3.0, 0.7, 0.1, hard)
        inputs = [backend.on(tensor, offset) for tensor in (weight, logits)]
        masked, stats = backend.ops.masked_weight(*inputs, *numbers, *draw, True)
        without, none = backend.ops.masked_weight(*inputs, *numbers, *draw, False)
        assert same_bits(masked, without) and none.numel() == 0
        of_logits, of_weight = backend.on(before, offset), backend.on(torch.full_like(weight, torch.nan), offset)
        backend.ops.masked_weight_backward(
            backend.on(grad, offset), *inputs, *numbers, *draw, of_logits, accumulate, of_weight if number % 2 else None
        )
        right = (weight, logits.double(), pattern, key, 3.0, 0.7)
        expected, sums = reference.forward(*right, hard, True)
        _, expected_of_weight = reference.backward(grad, *right, 0.1, hard)
        rounding = max(torch.finfo(dtype).eps, 4e-6)
        assert_close(masked, expected, rounding)
        assert_close(masked, CPU.masked_weight(weight, logits, *numbers, *draw, False)[0], rounding)
        assert_close(stats, sums, 4e-6)
        if number % 2:
            assert_close(of_weight, expected_of_weight, rounding)
        if accumulate:
            on_cpu = before.clone()
            CPU.masked_weight_backward(grad, weight, logits, *numbers, *draw, on_cpu, True, None)
            assert_close(of_logits, on_cpu, 4e-6)
        else:
            assert logits_gradient_error(of_logits.cpu(), grad, *right, 0.1, hard).max() <= TOLERANCE


@case
def masked_weights_of_a_single_block(backend: Backend) -> None:
    masked_weights(backend, "2:4", 1, 1)


@case
def masked_weights_with_odd_rows(backend: Backend) -> None:
    masked_weights(backend, "2:4", 5, 33)


@case
def masked_weights_at_unaligned_addresses(backend: Backend) -> None:
    masked_weights(backend, "2:4", 4, 10, offset=1)


@case
def masked_weights_of_several_turns(backend: Backend) -> None:
    """More blocks than the threads of a grid on a small device take in one turn."""
    masked_weights(backend, "2:4", 33, 260)


@case
def masked_weights_of_other_patterns(backend: Backend) -> None:
    for pattern, out, blocks in (("1:4", 3, 35), ("1:4", 1, 1), ("3:4", 3, 5), ("4:8", 3, 9), ("2:16", 1, 3)):
        masked_weights(backend, pattern, out, blocks)


@case
def empty_matrices(backend: Backend) -> None:
    ops, zero = backend.ops, torch.zeros
    draw = (2, 4, 0, 0, ShardMap(0).numbers(), 1.0, 1.0, 0.0, False)
    weight, logits = backend.on(zero(0, 8)), backend.on(zero(0, 2, 6))
    masked, stats = ops.masked_weight(weight, logits, *draw, True)
    assert masked.shape == (0, 8) and stats.tolist() == [0, 0]
    ops.masked_weight_backward(weight, weight, logits, *draw, torch.empty_like(logits), False, None)
    assert ops.winner_bits(logits, 2, 4).shape == (0, 1)
    assert ops.first_violation(weight, 2, 4).item() == -1
    values, metadata, first = ops.compress24(weight)
    assert (values.shape, metadata.shape, first.item()) == ((0, 4), (0, 1), -1)
    assert ops.decompress24(values, metadata).shape == (0, 8)
    ops.rounding(4, 0, 0, 0, ShardMap(4).numbers(), backend.on(zero(0, 6, dtype=torch.int32)))


@case
def winners(backend: Backend) -> None:
    for pattern, out, blocks in (("2:4", 1, 1), ("2:4", 9, 13), ("1:4", 3, 70), ("4:8", 5, 9), ("3:5", 4, 7), ("1:16", 2, 5)):
        pattern = Pattern.parse(pattern)
        for dtype in FLOATS:
            logits = torch.randint(-3, 4, (out, blocks, pattern.num_candidates)).to(dtype)  # many equal ones
            found = backend.ops.winner_bits(backend.on(logits), pattern.n, pattern.m)
            assert same_bits(found, CPU.winner_bits(logits, pattern.n, pattern.m))


def two_of_four(out: int, blocks: int, dtype: torch.dtype) -> torch.Tensor:
    """A random 2:4 matrix. Some blocks have fewer non-zeros, some zeros are negative."""
    values = torch.randint(-9, 10, (out, blocks, 4)).float()
    matrix = (values * (torch.rand(values.shape).argsort(-1).argsort(-1) < 2)).flatten(1)
    return matrix.to(dtype)


@case
def violations(backend: Backend) -> None:
    for n, m in ((2, 4), (4, 8), (1, 16), (33, 64)):
        for dtype in (*FLOATS, torch.int8):
            matrix = torch.zeros(7, 3 * m, dtype=dtype)
            matrix.view(7, 3, m)[..., :n] = 3
            assert backend.ops.first_violation(backend.on(matrix), n, m).item() == -1
            matrix[5, 2 * m + n] = 1
            matrix[6, n] = 1
            assert backend.ops.first_violation(backend.on(matrix), n, m).item() == 5 * 3 + 2
            if dtype.is_floating_point:
                matrix[5, 2 * m + n] = -0.0
                assert backend.ops.first_violation(backend.on(matrix), n, m).item() == 6 * 3


@case
def compression(backend: Backend) -> None:
    for (out, blocks), dtype in itertools.product(((1, 1), (9, 13), (3, 400), (2, 8)), (*FLOATS, torch.int8)):
        matrix = two_of_four(out, blocks, dtype)
        wanted, found = CPU.compress24(matrix), backend.ops.compress24(backend.on(matrix))
        assert all(same_bits(one, other) for one, other in zip(found, wanted, strict=True))
        assert same_bits(backend.ops.decompress24(*found[:2]), CPU.decompress24(*wanted[:2]))
        matrix[out - 1, 4 * blocks - 3 :] = 1
        assert backend.ops.compress24(backend.on(matrix))[2].item() == out * blocks - 1


@case
def rounding(backend: Backend) -> None:
    for candidates, blocks, first, count in ((6, 1, 0, 1), (6, 40, 37, 300), (4, 7, 5, 9), (70, 9, 1, 20)):
        key = NoiseKey(philox_key(3, "layer"), (1 << 40) + 7, ShardMap(blocks + 5, 2, 1, 3, 40))
        numbers = (blocks, first, key.signed_key, key.sample, key.shard.numbers())
        found, wanted = (torch.full((count, candidates), -1, dtype=torch.int32) for _ in range(2))
        found = backend.on(found)
        backend.ops.rounding(*numbers, found)
        CPU.rounding(*numbers, wanted)
        assert same_bits(found, wanted)


def on_device(backend: Backend, tensors: dict[str, torch.Tensor], offset: int = 0) -> list[torch.Tensor | None]:
    """A stored matrix on the device, as the operators take it."""
    return [None if tensor is None else backend.on(tensor, offset) for tensor in stored(tensors)]


def products(backend: Backend, layout: Layout, out: int, least: int, rows: int, number: int) -> None:
    """A product with a stored matrix against the dense one in fp64, and its expansion, bit for bit, against the CPU's."""
    in_features, dtype = columns(layout.pattern, least), FLOATS[number % 3]
    values = DTYPES[layout.bits][number % len(DTYPES[layout.bits])]
    tensors = sparse_pack(matrix(layout.pattern, out, in_features, values), layout)
    offset = 0 if number % 3 else 1  # vectors cannot be read from an odd address
    on, numbers = on_device(backend, tensors, offset), layout.numbers
    data = torch.randn(rows, in_features).to(dtype)
    bias = torch.randn(out).to(dtype) if number % 4 < 2 else None
    found = backend.ops.sparse_linear(backend.on(data, offset), *on, None if bias is None else backend.on(bias), *numbers).cpu()
    assert (found.dtype, found.shape) == (dtype, (rows, out))
    on_tiles = rows > 4 and layout.quantized and layout.pattern in (Pattern(2, 4), Pattern(1, 4))
    as_inputs = rows > 16 or on_tiles  # weights are rounded to the inputs' dtype
    dense = stored_reference.expand(*stored(tensors), in_features, numbers, dtype if as_inputs else torch.float32)
    assert_near(found, data, dense.double(), torch.zeros(out) if bias is None else bias, False)
    wanted = FLOATS[number // 2 % 3]
    expanded = backend.ops.sparse_expand(*on, in_features, *numbers, wanted)
    assert same_bits(expanded, CPU.sparse_expand(*stored(tensors), in_features, *numbers, wanted))
    assert backend.ops.sparse_check(*on, in_features, *numbers).tolist() == [0, 0, 0]


@case
def products_with_every_layout(backend: Backend) -> None:
    sizes = ((5, 208, 3), (3, 272, 16), (9, 1040, 1), (2, 264, 7))
    for number, layout in enumerate(ALL_LAYOUTS):
        for turn in range(2):
            products(backend, layout, *sizes[(number + 2 * turn) % 4], number + turn)
        if number % 7 < 2:
            products(backend, layout, 1, 4, 1, number)


@case
def products_of_wide_matrices(backend: Backend) -> None:
    """More columns than the threads of a block take in one turn."""
    for number, layout in enumerate(
        (Layout(Pattern(2, 4), 16), Layout(Pattern(1, 4), 8, 64), Layout(Pattern(2, 4), 4, 128), Layout(None, 16))
    ):
        for rows in (1, 7):
            products(backend, layout, 6, 4400, rows, number)


@case
def products_of_many_rows(backend: Backend) -> None:
    for number, layout in enumerate(
        (Layout(Pattern(2, 4), 16), Layout(Pattern(1, 4), 8), Layout(Pattern(4, 8), 32), Layout(None, 4))
    ):
        products(backend, layout, 5, 72, 17, number)


@case
def products_with_inputs_of_any_shape(backend: Backend) -> None:
    layout = Layout(Pattern(2, 4), 16)
    on = on_device(backend, sparse_pack(matrix(layout.pattern, 10, 128, torch.bfloat16), layout))
    data = backend.on(torch.randn(3, 2, 256).bfloat16())
    flat = backend.ops.sparse_linear(data[..., ::2].reshape(6, 128), *on, None, *layout.numbers)
    for part, wanted in ((data[..., ::2], flat.view(3, 2, 10)), (data[:0, :, ::2], flat[:0].view(0, 2, 10))):
        found = backend.ops.sparse_linear(part, *on, None, *layout.numbers)
        assert found.shape == wanted.shape and torch.equal(found, wanted)
    none = backend.ops.sparse_linear(data[0, 0, ::2], *[each if each is None else each[:0] for each in on], None, *layout.numbers)
    assert none.shape == (0,)


@case
def faults_of_stored_matrices(backend: Backend) -> None:
    for layout, key, place, change in FAULTS.values():
        in_features = columns(layout.pattern, 65)
        tensors = sparse_pack(matrix(layout.pattern, 5, in_features, DTYPES[layout.bits][0]), layout)
        tensors[key] = tensors[key].clone()
        tensors[key][place] = change(tensors[key][place].item())
        found = backend.ops.sparse_check(*on_device(backend, tensors), in_features, *layout.numbers)
        assert tuple(found.tolist()) == stored_reference.first_fault(*stored(tensors), in_features, layout.numbers)


@case
def damaged_matrices(backend: Backend) -> None:
    """Random bits flipped: the check finds what the CPU's finds, and what passes it is expanded inside of its tensors."""
    for number in range(70):
        layout = ALL_LAYOUTS[number % len(ALL_LAYOUTS)]
        out, in_features = 1 + number % 9, columns(layout.pattern, 1 + 7 * (number % 29))
        tensors = sparse_pack(matrix(layout.pattern, out, in_features, DTYPES[layout.bits][0], seed=number), layout)
        for key in tensors:
            if torch.rand(()) < 0.5 and tensors[key].numel():
                tensors[key] = tensors[key].clone()
                memory = tensors[key].view(-1).view(torch.uint8)
                memory[torch.randint(len(memory), ())] ^= 1 << int(torch.randint(8, ()))
        on = on_device(backend, tensors)
        found = backend.ops.sparse_check(*on, in_features, *layout.numbers).tolist()
        assert found == CPU.sparse_check(*stored(tensors), in_features, *layout.numbers).tolist()
        if found[0] == stored_reference.FINE:
            backend.ops.sparse_expand(*on, in_features, *layout.numbers, torch.float32)
            backend.ops.sparse_linear(backend.on(torch.randn(2, in_features)), *on, None, *layout.numbers)


def emulated(library: str) -> Backend:
    """The kernels that a library has for CPU tensors."""
    for name in OPERATORS:
        schema = str(getattr(CPU, name).default._schema).split("::")[1]
        torch.library.define(f"maskllm_emulated::{name}", schema[len(name) :])
    torch.ops.load_library(library)
    return Backend(torch.ops.maskllm_emulated, torch.device("cpu"))


def main() -> None:
    backend = emulated(sys.argv[1])
    torch.set_num_threads(1)
    names = sys.argv[2:] or list(CASES)
    for name in names:
        print(name, flush=True)
        torch.manual_seed(0)
        CASES[name](backend)
    print(f"{len(names)} cases")


if __name__ == "__main__":
    main()
