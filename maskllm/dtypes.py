"""The names of floating-point dtypes: on the command line, in `config.json` and in safetensors files."""

from __future__ import annotations

import torch

BY_FLAG = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names in command-line options."""

COMPUTE = ("bf16", "fp32")
"""The names of the dtypes that training and pruning can compute in."""

BY_SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names in safetensors files, for the dtypes that a weight may have."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name in `config.json` and in reports: "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


BY_NAME = {dtype_name(dtype): dtype for dtype in BY_SAFETENSORS.values()}
"""Names in `config.json`."""
