"""The products with AVX-512 VNNI, VBMI, VBMI2 and BF16 and with AMX over emulated instructions, for processors with plain AVX-512 alone."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from maskllm.ops import Layout, sparse_pack
from maskllm.ops import sparse_reference as reference
from maskllm.ops.extension import kernels
from maskllm.patterns import Pattern
from tests.ops.test_sparse_linear import DTYPES, assert_near, matrix, multiplies_integers, name, stored

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(kernels() is None or "avx512" not in kernels().instruction_sets(), reason="needs AVX-512"),
]
FLOAT32, BFLOAT16, QUANTIZED = range(3)
LAYOUTS = [
    Layout(pattern, bits, group_size)
    for pattern in (Pattern(2, 4), Pattern(1, 4), Pattern(4, 8))
    for bits, group_size in ((16, -1), (32, -1), (8, -1), (8, 128), (4, 32), (4, 512))
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "product.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cpu'}", "-I."]
    subprocess.run(["g++", *flags, "product.cpp", "-o", str(path)], check=True, cwd=Path(__file__).parent / "emulated")
    library = ctypes.CDLL(str(path))
    library.expand_to_bf16.argtypes = [ctypes.c_void_p] * 5
    library.product.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64, ctypes.c_bool, ctypes.c_void_p]
    library.tiles.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] + [ctypes.c_void_p] * 2
    library.tiles.restype = ctypes.c_bool
    return library


def stored_matrix(layout, out, in_features):
    """A matrix as dense fp32 numbers; the addresses of its values, places, scales and sizes; and the tensors there, to keep alive."""
    tensors = sparse_pack(matrix(layout.pattern, out, in_features, DTYPES[layout.bits][0]), layout)
    dense = reference.expand(*stored(tensors), in_features, layout.numbers, torch.float32)
    values, places, scales, _ = stored(tensors)
    n, m, bits, group_size = layout.numbers
    kept = in_features // m * n
    form = {(2, 4): 0, (1, 4): 1}.get((n, m), 2)
    kind = {32: 0, 16: 1, 8: 3, 4: 4}[bits]
    groups = reference.groups(in_features, group_size)
    group_size = in_features if groups == 1 else group_size
    sizes = (kept, out * kept, values[0].nbytes, places.shape[1])
    numbers = torch.tensor((form, kind, n, m, out, in_features, *sizes, groups, group_size))
    alive = (values, places, scales, numbers)
    return dense, [None if each is None else each.data_ptr() for each in alive], alive


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_products_match_the_dense_product_in_fp64(library, layout):
    for out, in_features, rows in ((1, 8, 1), (3, 200, 2), (9, 264, 7), (6, 1032, 1), (8, 1024, 16)):
        dense, pointers, _alive = stored_matrix(layout, out, in_features)
        bits, indexed = layout.bits, layout.pattern in (Pattern(2, 4), Pattern(1, 4))
        data = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows))
        data = data.bfloat16().float() if bits == 16 else data
        result = torch.full((rows, out), torch.nan)
        found = library.product(*pointers, data.data_ptr(), rows, bits == 16, result.data_ptr())
        rounded = multiplies_integers(layout, in_features)
        assert found == (QUANTIZED if rounded else BFLOAT16 if bits == 16 and indexed else FLOAT32)
        assert_near(result, data, dense.double(), torch.zeros(out), rounded)
        halves = torch.full((out, in_features), torch.nan, dtype=torch.bfloat16)
        library.expand_to_bf16(*pointers, halves.data_ptr())
        assert torch.equal(halves, dense.bfloat16())


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_products_by_tiles_match_the_dense_product_in_fp64(library, layout):
    """One and several tiles of the matrix and of activations, parts of 512 columns and odd ends, with and without bias."""
    for out, in_features, rows in ((1, 8, 1), (33, 200, 16), (31, 1032, 17), (64, 520, 40), (130, 1032, 70)):
        dense, pointers, _alive = stored_matrix(layout, out, in_features)
        data = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows)).bfloat16()
        bias = torch.randn(out).bfloat16() if rows % 2 == 0 else None
        result = torch.full((rows, out), torch.nan, dtype=torch.bfloat16)
        more = (None if bias is None else bias.data_ptr(), result.data_ptr())
        if layout.bits == 32:
            assert not library.tiles(*pointers, data.data_ptr(), rows, *more)
            continue
        assert library.tiles(*pointers, data.data_ptr(), rows, *more)
        assert_near(result, data, dense.bfloat16().double(), torch.zeros(out) if bias is None else bias, False)
