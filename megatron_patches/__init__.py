"""Every change this project makes to Megatron Core's behaviour, for versions 0.16 to 0.19.

`apply()` is called once by each entry point that runs Megatron. Without a CUDA device it applies the patches of
`megatron_patches.cpu`; with one it changes nothing.
"""

from __future__ import annotations

import torch

_applied = False


def apply() -> None:
    """Apply the patches that this machine needs; later calls do nothing."""
    global _applied
    if _applied or torch.cuda.is_available():
        return
    from megatron_patches import cpu

    for patch in cpu.PATCHES:
        patch.function()
    _applied = True
