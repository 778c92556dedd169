"""The memory that a measurement took."""

from __future__ import annotations

import torch

from maskllm.processes import peak_resident_bytes


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this process has held, in bytes: with a GPU as `device` what PyTorch has allocated there, else resident."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
