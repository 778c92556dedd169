"""Products with stored non-zeros: exactness, the documented layout, what is refused, instruction sets and threads."""

import itertools

import numpy as np
import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import Layout, extension, sparse_check, sparse_expand, sparse_linear, sparse_pack
from maskllm.ops import sparse_reference as reference
from maskllm.ops.extension import kernels
from maskllm.ops.sparse_linear import TENSORS
from maskllm.patterns import Pattern

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(4, 8), Pattern(1, 16), Pattern(16, 64), None]
DTYPES = {32: [torch.float32], 16: [torch.bfloat16, torch.float16], 8: [torch.bfloat16], 4: [torch.float32]}
needs_kernels = pytest.mark.skipif(kernels() is None, reason="the kernels were not built")


def matrix(pattern, out, in_features, dtype=torch.float32, seed=0):
    """A random matrix that follows the pattern (half of the weights if None); some blocks have fewer non-zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, in_features, generator=generator)
    score = torch.rand(out, in_features, generator=generator)
    if pattern is None:
        mask = score < 0.5
    else:
        order = score.view(out, -1, pattern.m).argsort(-1).argsort(-1)
        mask = (order < pattern.n).view(out, in_features)
    mask &= torch.rand(out, in_features, generator=generator) > 0.05
    return torch.where(mask, weight, 0).to(dtype)


def columns(pattern, least):
    """The first number of columns from `least` on that the pattern divides."""
    m = pattern.m if pattern else 1
    return -(-least // m) * m


def layouts(bits):
    for pattern in PATTERNS:
        yield Layout(pattern, bits)
        if bits in (8, 4):
            for group_size in (128, 64, 3 * (pattern.m if pattern else 1)):
                yield Layout(pattern, bits, group_size)


ALL_LAYOUTS = [layout for bits in (32, 16, 8, 4) for layout in layouts(bits)]


def name(layout):
    return f"{layout.pattern or 'any'}-{layout.bits}-{layout.group_size}"


def stored(tensors):
    return [tensors.get(key) for key in TENSORS]


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=name)
def test_round_trip(layout):
    for dtype, least in itertools.product(DTYPES[layout.bits], (1, 20, 200)):
        in_features = columns(layout.pattern, least)
        weight = matrix(layout.pattern, 5, in_features, dtype)
        tensors = sparse_pack(weight, layout)
        kept = tensors["row_starts"][-1] if layout.pattern is None else None
        assert {key: list(value.shape) for key, value in tensors.items()} == layout.shapes(5, in_features, kept)
        assert {key: value.dtype for key, value in tensors.items()} == layout.dtypes(dtype)
        sparse_check(tensors, layout, 5, in_features, "w")
        expanded = sparse_expand(tensors, layout, in_features, torch.float32)
        if layout.quantized:
            error = (expanded - weight.float()).abs()
            step = reference.each_column(tensors["scales"], in_features, layout.group_size)
            assert bool((error <= 0.5001 * step).all())
            assert not expanded[weight == 0].any()
        else:
            same = sparse_expand(tensors, layout, in_features, dtype)
            assert torch.equal(same.view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_negative_zeros_and_nan_come_back(pattern, bits):
    dtype = DTYPES[bits][0]
    weight = torch.zeros(3, columns(pattern, 40), dtype=dtype)
    weight[0, 3], weight[1, 1], weight[2, 5], weight[2, -1] = -0.0, torch.nan, torch.inf, -0.0
    tensors = sparse_pack(weight, Layout(pattern, bits))
    expanded = sparse_expand(tensors, Layout(pattern, bits), weight.shape[1], dtype)
    assert torch.equal(expanded.view(torch.uint8), weight.view(torch.uint8))


def test_layout_is_the_documented_one():
    weight = torch.tensor([[0, 5, 0, 6, 7, -7, 0, 0, 0, 0, 1, 0]]).float()
    two = sparse_pack(weight, Layout(Pattern(2, 4), 32))
    assert two["values"].tolist() == [[5, 6, 7, -7, 0, 1]]
    assert two["places"].tolist() == [[(1 | 3 << 2) | (0 | 1 << 2) << 4, 0 | 2 << 2]]
    four = sparse_pack(weight, Layout(Pattern(2, 4), 4, 4))
    assert four["scales"].tolist() == [[np.float32(6) / np.float32(7), 1, np.float32(1) / np.float32(7)]]
    assert four["values"].tolist() == [[6 | 7 << 4, 7 | 9 << 4, 0 | 7 << 4]]
    one = sparse_pack(weight * torch.tensor([[1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]]), Layout(Pattern(1, 4), 32))
    assert one["values"].tolist() == [[0, -7, 1]]
    assert one["places"].tolist() == [[0 | 1 << 2 | 2 << 4]]
    mask = sparse_pack(weight, Layout(None, 32))
    assert mask["places"].tolist() == np.packbits(weight.numpy() != 0, axis=1, bitorder="little").tolist()
    assert (mask["values"].tolist(), mask["row_starts"].tolist()) == ([5, 6, 7, -7, 1], [0, 5])


def test_a_mask_keeps_zeros_and_given_scales_are_used():
    weight = torch.tensor([[0.0, 3.0, 0.0, 0.0]])
    kept = sparse_pack(weight, Layout(Pattern(2, 4), 32), mask=torch.tensor([[False, True, False, True]]))
    assert (kept["values"].tolist(), kept["places"].tolist()) == ([[3, 0]], [[1 | 3 << 2]])
    scaled = sparse_pack(weight, Layout(Pattern(2, 4), 8), scales=torch.tensor([[0.5]]))
    assert (scaled["values"].tolist(), scaled["scales"].tolist()) == ([[0, 6]], [[0.5]])
    with pytest.raises(MaskLLMError, match=r"^fc1: row 0, column 1 is not zero, and its mask does not keep it"):
        sparse_pack(weight, Layout(Pattern(2, 4), 32), "fc1", mask=torch.tensor([[True, False, False, True]]))
    mask = torch.tensor([[True, True, False, False]])
    assert sparse_pack(torch.tensor([[0.0, 3, -0.0, 0]]), Layout(None, 32), mask=mask)["row_starts"].tolist() == [0, 2]


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)], ids=str)
def test_too_many_non_zeros_are_refused_with_their_place(pattern):
    weight = matrix(pattern, 4, 64)
    weight[2, 2 * pattern.m : 3 * pattern.m] = 1
    with pytest.raises(MaskLLMError, match=rf"^fc1: row 2, block 2 .* has {pattern.m} non-zeros; pattern {pattern} allows"):
        sparse_pack(weight, Layout(pattern, 32), "fc1")


def test_layouts_that_make_no_sense_are_refused():
    for pattern, bits, group_size in ((None, 7, -1), (Pattern(2, 4), 16, 128), (Pattern(2, 4), 8, 6), (None, 4, 0)):
        with pytest.raises(MaskLLMError, match="wanted"):
            Layout(pattern, bits, group_size)
    with pytest.raises(MaskLLMError, match="finite"):
        sparse_pack(torch.tensor([[torch.nan, 0, 0, 0]]), Layout(Pattern(2, 4), 8))
    with pytest.raises(MaskLLMError, match="bfloat16"):
        sparse_pack(torch.zeros(1, 4, dtype=torch.bfloat16), Layout(Pattern(2, 4), 32))


def test_the_reference_product_is_the_dense_one():
    layout = Layout(Pattern(2, 4), 32)
    weight, data, bias = matrix(layout.pattern, 6, 20), torch.randn(2, 3, 20), torch.randn(6)
    found = torch.ops.maskllm.sparse_linear(data, *stored(sparse_pack(weight, layout)), bias, *layout.numbers)
    assert torch.allclose(found, torch.nn.functional.linear(data, weight, bias), atol=1e-5)
    assert torch.equal(found, sparse_linear(data, sparse_pack(weight, layout), layout, bias))


def rounded_inputs(data):
    """`data` [rows, in] in fp64, each 128 columns of a row rounded to 8 bits, and a step where rounding may go either way."""
    padded = torch.nn.functional.pad(data.double(), (0, -data.shape[1] % 128)).unflatten(1, (-1, 128))
    scale = padded.abs().amax(-1, keepdim=True) / 127
    numbers = padded / scale.clamp(min=1e-30)
    doubt = (((numbers - numbers.floor()) - 0.5).abs() < 1e-4) * scale
    return [each.flatten(1)[:, : data.shape[1]] for each in (numbers.round() * scale, doubt)]


def multiplies_integers(layout, in_features):
    """Whether the loops of a few rows round the inputs."""
    if not layout.quantized or layout.pattern not in (Pattern(2, 4), Pattern(1, 4)):
        return False
    size = layout.group_size
    return size == -1 or size >= in_features or (size & size - 1 == 0 and size >= 16 // layout.pattern.n)


def rounds_weights(instruction_set, layout, in_features, rows, values, inputs):
    """Whether the weights are multiplied as bf16 numbers, like those of a dense model in bf16. `values` and `inputs` are dtypes."""
    if inputs != torch.bfloat16 or instruction_set not in ("avx512_bf16", "avx512_amx"):
        return False
    few = 64 if layout.pattern in (Pattern(2, 4), Pattern(1, 4)) else 2  # a bitmask
    one_scale = layout.group_size == -1 or layout.group_size >= in_features or layout.group_size % 32 == 0
    if instruction_set == "avx512_amx" and (one_scale if layout.quantized else values == torch.bfloat16):
        gathers = multiplies_integers(layout, in_features) or not layout.quantized
        of_pattern = {Pattern(2, 4): 1, Pattern(1, 4): 2}.get(layout.pattern, 0) if gathers else 0
        few = of_pattern * (10 if layout.quantized else 4)
    return rows > few


def assert_near(found, data, dense, bias, rounded):
    """`found` is `data @ dense.T + bias` in fp64, but for fp32 sums and the rounding of the result (and of the inputs)."""
    inputs, doubt = rounded_inputs(data) if rounded else (data.double(), torch.zeros_like(data, dtype=torch.float64))
    exact = inputs @ dense.T + bias.double()
    size = inputs.abs() @ dense.abs().T + bias.double().abs()
    allowed = 4e-6 * size + torch.finfo(found.dtype).eps * exact.abs() + doubt @ dense.abs().T + 1e-7
    assert bool(((found.double() - exact).abs() <= allowed).all()), float(((found.double() - exact).abs() / allowed).max())


@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=name)
def test_products_match_the_dense_product_in_fp64(instruction_set, layout):
    """Odd sizes, tails, one row and many, every dtype, with and without bias."""
    for number, (out, least) in enumerate([(1, 4), (3, 20), (4, 200), (9, 264), (6, 1032)]):
        in_features = columns(layout.pattern, least)
        for rows in (1, 2, 7, 16) if number % 2 else (1, 4, 33, 70):
            dtype = [torch.float32, torch.bfloat16, torch.float16][(number + rows) % 3]
            values = DTYPES[layout.bits][rows % len(DTYPES[layout.bits])]
            tensors = sparse_pack(matrix(layout.pattern, out, in_features, values), layout)
            dense = reference.expand(*stored(tensors), in_features, layout.numbers, torch.float32)
            assert torch.equal(sparse_expand(tensors, layout, in_features, torch.float32), dense)
            assert torch.equal(sparse_expand(tensors, layout, in_features, dtype), dense.to(dtype))
            generator = torch.Generator().manual_seed(rows)
            data = torch.randn(rows, in_features, generator=generator).to(dtype)
            bias = torch.randn(out, generator=generator).to(dtype) if number % 2 else None
            found = sparse_linear(data, tensors, layout, bias)
            assert (found.dtype, found.shape) == (dtype, (rows, out))
            in_bf16 = rounds_weights(instruction_set, layout, in_features, rows, values, dtype)
            few = 1 if instruction_set == "portable" else 64
            rounded = rows <= few and not in_bf16 and multiplies_integers(layout, in_features)
            multiplied = dense.bfloat16() if in_bf16 else dense
            assert_near(found, data, multiplied.double(), torch.zeros(out) if bias is None else bias, rounded)


@needs_kernels
@pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=name)
def test_any_number_of_threads_gives_the_same_bits(layout):
    out, in_features = 333, columns(layout.pattern, 520)
    tensors = sparse_pack(matrix(layout.pattern, out, in_features, DTYPES[layout.bits][0]), layout)
    threads = torch.get_num_threads()
    try:
        for rows, dtype in ((1, torch.float32), (5, torch.float32), (16, torch.float32), (40, torch.bfloat16)):
            found = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                data = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
                found.append(sparse_linear(data, tensors, layout))
            assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.parametrize("out", [1, 48, 150])
def test_many_rows_have_the_same_bits_with_any_number_of_threads(out):
    """One tile and several; the rows of activations are long enough that MKL cuts their sums."""
    tensors = sparse_pack(matrix(Pattern(2, 4), out, 4096), Layout(Pattern(2, 4), 32))
    data, bias = torch.randn(200, 4096, generator=torch.Generator().manual_seed(0)), torch.randn(out)
    threads = torch.get_num_threads()
    try:
        for rows, added in ((65, None), (200, bias)):
            found = []
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                found.append(sparse_linear(data[:rows], tensors, Layout(Pattern(2, 4), 32), added))
            assert all(torch.equal(found[0], other) for other in found[1:])
            dense = sparse_expand(tensors, Layout(Pattern(2, 4), 32), 4096, torch.float32)
            assert_near(found[0], data[:rows], dense.double(), torch.zeros(out) if added is None else added, False)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [Layout(Pattern(2, 4), 16), Layout(Pattern(1, 4), 4, 64), Layout(None, 8)], ids=name)
def test_shapes_of_inputs(layout):
    tensors = sparse_pack(matrix(layout.pattern, 10, 128, torch.bfloat16), layout)
    data, bias = torch.randn(3, 2, 256, dtype=torch.bfloat16), torch.randn(10, dtype=torch.bfloat16)
    flat = sparse_linear(data[..., ::2].reshape(6, 128), tensors, layout, bias)
    assert torch.equal(sparse_linear(data[..., ::2], tensors, layout, bias), flat.view(3, 2, 10))
    assert torch.equal(
        sparse_linear(data[0, 0, ::2], tensors, layout, bias), sparse_linear(data[:1, 0, ::2], tensors, layout, bias)[0]
    )
    assert sparse_linear(data[:0, :, ::2], tensors, layout, bias).shape == (0, 2, 10)


@pytest.mark.parametrize("layout", [Layout(Pattern(2, 4), 32), Layout(Pattern(1, 4), 8), Layout(Pattern(2, 4), 4, 64)], ids=name)
def test_activations_that_are_not_finite_make_nan(instruction_set, layout):
    tensors = sparse_pack(matrix(layout.pattern, 8, 256), layout)
    dense = sparse_expand(tensors, layout, 256, torch.float32)
    for bad in (torch.nan, torch.inf):
        column = int(dense[3].nonzero()[5])
        data = torch.zeros(2, 256)
        data[1, column] = bad
        found = sparse_linear(data, tensors, layout)
        assert not found[0].any() and not found[1, 3].isfinite()


@pytest.mark.parametrize("layout", ALL_LAYOUTS[::3], ids=name)
def test_operators_pass_opcheck_and_compile(layout):
    in_features = columns(layout.pattern, 64)
    tensors = sparse_pack(matrix(layout.pattern, 6, in_features, DTYPES[layout.bits][0]), layout)
    data, bias = torch.randn(3, in_features), torch.randn(6)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.maskllm
    torch.library.opcheck(ops.sparse_linear.default, (data, *stored(tensors), bias, *layout.numbers), test_utils=tests)
    torch.library.opcheck(
        ops.sparse_expand.default, (*stored(tensors), in_features, *layout.numbers, torch.bfloat16), test_utils=tests
    )
    torch.library.opcheck(ops.sparse_check.default, (*stored(tensors), in_features, *layout.numbers), test_utils=tests)


def test_a_product_compiles_as_one_graph():
    layout = Layout(Pattern(2, 4), 32)
    tensors = sparse_pack(matrix(layout.pattern, 6, 64), layout)
    graph = torch.compile(lambda data: sparse_linear(data, tensors, layout).relu(), fullgraph=True, backend="aot_eager")
    data = torch.randn(2, 3, 64)
    assert torch.equal(graph(data), sparse_linear(data, tensors, layout).relu())


FAULTS = {
    "places: row 3, block 5 keeps columns 2 and 2 of 4": (Layout(Pattern(2, 4), 8), "places", (3, 2), lambda b: b & 15 | 0xA0),
    "places: row 4, block 16 keeps columns 3 and 1 of 4": (Layout(Pattern(2, 4), 16), "places", (4, 8), lambda b: 1 << 2 | 3),
    "places: row 1, block 2 does not keep 4 of 8": (Layout(Pattern(4, 8), 32), "places", (1, 2), lambda b: b ^ 16),
    "places: row 0, block 1 does not keep 3 of 12": (Layout(Pattern(3, 12), 32), "places", (0, 2), lambda b: b ^ 128),
    "places: row 2, block 0 does not keep 33 of 64": (Layout(Pattern(33, 64), 32), "places", (2, 7), lambda b: b ^ 128),
    "places: row 2 keeps another number of columns than its": (Layout(None, 32), "places", (2, 3), lambda b: b ^ 2),
    "places: row 4 has bits after its 68 columns": (Layout(Pattern(2, 4), 32), "places", (4, 8), lambda b: b | 64),
    "places: row 3 has bits after its 68 columns": (Layout(Pattern(1, 4), 32), "places", (3, 4), lambda b: b | 8),
    "places: row 0 has bits after its 65 columns": (Layout(None, 8), "places", (0, 8), lambda b: b | 8),
    "scales: row 4, group 1 is nan": (Layout(Pattern(2, 4), 8, 64), "scales", (4, 1), lambda s: torch.nan),
    "scales: row 0, group 0 is inf": (Layout(Pattern(1, 4), 4), "scales", (0, 0), lambda s: torch.inf),
    "scales: row 2, group 0 is -": (Layout(None, 4), "scales", (2, 0), lambda s: -s),
    "values: row 1, value 7 is -128": (Layout(Pattern(2, 4), 8), "values", (1, 7), lambda v: -128),
    "values: row 2, value 7 is -8": (Layout(Pattern(2, 4), 4), "values", (2, 3), lambda v: v & 15 | 128),
    "row_starts: row 0 goes from 1": (Layout(None, 32), "row_starts", (0,), lambda v: 1),
    "row_starts: row 2 goes from -9223372036854775808": (Layout(None, 4), "row_starts", (2,), lambda v: -(1 << 63)),
    "row_starts: row 4 goes from": (Layout(None, 32), "row_starts", (5,), lambda v: (1 << 63) - 1),
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_refused_by_name_and_place(message):
    layout, key, place, change = FAULTS[message]
    in_features = columns(layout.pattern, 65)
    tensors = sparse_pack(matrix(layout.pattern, 5, in_features, DTYPES[layout.bits][0]), layout)
    tensors[key] = tensors[key].clone()
    tensors[key][place] = change(tensors[key][place].item())
    if message.startswith("row_starts: row 2"):
        message = message.replace("row 2 goes from", "row 1 goes from .* to")
    with pytest.raises(MaskLLMError, match=r"^model\.w\." + message):
        sparse_check(tensors, layout, 5, in_features, "model.w")
    arguments = (*stored(tensors), in_features, layout.numbers)
    found = torch.ops.maskllm.sparse_check(*stored(tensors), in_features, *layout.numbers)
    assert tuple(found.tolist()) == reference.first_fault(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(values=t["values"][:, :-1]),
        lambda t: t.update(values=t["values"].half()),
        lambda t: t.update(places=t["places"][:-1]),
        lambda t: t.update(places=t["places"].view(torch.int8)),
        lambda t: t.update(places=t["places"].flatten()),
        lambda t: t.update(scales=t["scales"].double()),
        lambda t: t.update(scales=t["scales"][:0]),
        lambda t: t.update(row_starts=torch.zeros(6, dtype=torch.int64)),
        lambda t: t.pop("scales"),
        lambda t: t.pop("values"),
        lambda t: t.update(scales=t["scales"].to("meta")),
    ],
)
def test_wrong_tensors_are_refused_and_never_multiplied(change):
    layout = Layout(Pattern(2, 4), 8)
    tensors = sparse_pack(matrix(layout.pattern, 5, 64), layout)
    change(tensors)
    with pytest.raises(MaskLLMError, match=r"^model\.w"):
        sparse_check(tensors, layout, 5, 64, "model.w")
    if len(tensors) > 2 and "values" in tensors and not tensors["scales"].is_meta and kernels() is not None:
        with pytest.raises(RuntimeError, match="wanted"):
            sparse_linear(torch.zeros(1, 64), tensors, layout)
        with pytest.raises(RuntimeError, match="wanted"):
            sparse_expand(tensors, layout, 64, torch.float32)


@needs_kernels
def test_crafted_sizes_are_refused():
    layout = Layout(Pattern(2, 4), 32)
    tensors = sparse_pack(matrix(layout.pattern, 5, 64), layout)
    for in_features in (-4, 60, 68, 1 << 31, (1 << 62) + 64, 1 << 62):
        with pytest.raises(RuntimeError, match="wanted"):
            sparse_expand(tensors, layout, in_features, torch.float32)
        with pytest.raises(MaskLLMError, match=r"^w"):
            sparse_check(tensors, layout, 5, in_features, "w")
    for n, m in ((4, 4), (0, 4), (1, 65), (2, -4), (-1, -1), (1 << 40, 1 << 41)):
        with pytest.raises(RuntimeError, match="wanted"):
            torch.ops.maskllm.sparse_expand(*stored(tensors), 64, n, m, 32, -1, torch.float32)
    with pytest.raises(RuntimeError, match="wanted"):
        sparse_linear(torch.zeros(1, 64), tensors, layout, torch.zeros(4))
    with pytest.raises(RuntimeError, match="wanted"):
        sparse_linear(torch.zeros(1, 64, dtype=torch.float64), tensors, layout)


def test_a_product_by_the_reference_warns_once(monkeypatch):
    monkeypatch.setattr(extension, "has_kernels", lambda device_type: False)
    extension.warn_if_reference.cache_clear()
    layout = Layout(Pattern(2, 4), 32)
    tensors = sparse_pack(matrix(layout.pattern, 4, 16), layout)
    with pytest.warns(RuntimeWarning, match="without cpu kernels"):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
        torch.ops.maskllm.sparse_linear.default.redispatch(keys, torch.ones(1, 16), *stored(tensors), None, *layout.numbers)
    extension.warn_if_reference.cache_clear()
