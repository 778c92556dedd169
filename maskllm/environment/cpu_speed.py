"""Which dtypes this CPU computes in natively."""

from __future__ import annotations

import torch

from maskllm.dtypes import dtype_name


def computes_natively(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for matrix products in `dtype`. Without them torch is many times slower than in fp32."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if dtype is torch.float16:
        return getattr(torch.cpu, "_is_amx_fp16_supported", lambda: False)()
    return True


def slow_dtype_warning(dtype: torch.dtype) -> str | None:
    """A warning for a run that computes in `dtype` on a CPU without instructions for it. None for other runs."""
    if torch.cuda.is_available() or computes_natively(dtype):
        return None
    return (
        f"this CPU has no instructions for {dtype_name(dtype)} and is many times slower in it; --params-dtype fp32 computes "
        "with the same weights"
    )
