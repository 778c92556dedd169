"""Run under torchrun's environment by test_megatron_patches: `maskllm.train` with one patch of Megatron Core left out.

usage: python -m tests.without_patch PATCH ARGUMENTS...
"""

from __future__ import annotations

import sys

import torch

import megatron_patches


def main(name: str, *arguments: str) -> int:
    """Train; returns the exit status."""
    megatron_patches.import_megatron()
    from maskllm import train
    from megatron_patches import checkpoints, cpu, optimizer, recomputation

    for module in (checkpoints, cpu, optimizer, recomputation):
        module.PATCHES[:] = [patch for patch in module.PATCHES if patch.function.__name__ != name]
    torch.set_num_threads(1)
    return train.main(arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
