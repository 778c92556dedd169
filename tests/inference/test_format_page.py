"""The reader in docs/compressed-format.md reads what `maskllm compress` writes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from maskllm.export.compress import CompressSettings, compress, decompress
from maskllm.huggingface.blocks import block_linears
from tests.inference.sparse_models import sparse_model

PAGE = Path(__file__).parents[2] / "docs" / "compressed-format.md"


@pytest.fixture(scope="module")
def read():
    """The function of the page."""
    (program,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len([line for line in program.splitlines() if line]) <= 30
    names: dict = {}
    exec(program, names)
    return names["read"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("kind", "n", "m"), [("llama3", 2, 4), ("gpt2", 1, 4), ("llama3", 3, 16), ("llama3", 0, 0)])
def test_the_reader_of_the_page(read, kind, n, m, bits, dtype, tmp_path):
    model = sparse_model(kind, dtype, n or 2, m or 4)
    if not n:
        torch.manual_seed(1)
        for linear in block_linears(model).values():
            nn.init.normal_(linear.weight).data.masked_fill_(torch.rand(linear.weight.shape) < 0.7, 0)
    model.save_pretrained(tmp_path / "hf")
    for group_size in (16,) if bits is None else (16, -1, 128):  # 128: more columns than some matrices have
        path = tmp_path / f"small{group_size}"
        compress(tmp_path / "hf", path, CompressSettings(bits, group_size=group_size))
        found = read(path)
        decompress(path, tmp_path / f"back{group_size}")
        wanted = load_file(tmp_path / f"back{group_size}" / "model.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            close = 0.005 if bits is not None and dtype == torch.bfloat16 else 0  # decompressed integers are rounded to bf16
            np.testing.assert_allclose(found[name].astype(np.float32), tensor.float().numpy(), rtol=close)
