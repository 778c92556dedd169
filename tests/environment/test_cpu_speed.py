"""Which dtypes count as slow on this CPU."""

from __future__ import annotations

import pytest
import torch

from maskllm.environment.cpu_speed import slow_dtype_warning


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("supported", [False, True])
def test_a_dtype_without_cpu_instructions_gets_a_warning(supported, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    warning = slow_dtype_warning(torch.bfloat16)
    assert warning is None if supported else "no instructions for bfloat16" in warning and "--params-dtype fp32" in warning
    assert slow_dtype_warning(torch.float32) is None
