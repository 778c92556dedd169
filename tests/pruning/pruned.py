"""Prune a checkpoint, and read its masks and weights, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.families.registry import parameter_map
from maskllm.patterns import unpack_mask


def hf_masks(path: Path) -> dict[str, torch.Tensor]:
    """The masks of a checkpoint: Hugging Face name -> bool [out, in]."""
    checkpoint = resolve(path)
    masks = {}
    for mapping in parameter_map(checkpoint.model_config):
        weight = checkpoint.tensors[mapping.megatron]
        if mapping.linear is not None:
            bits = checkpoint.tensors[f"{mapping.linear}.mask_bits"].load()
            parts = mapping.to_hf(unpack_mask(bits, weight.shape[1]), checkpoint.model_config)
            masks.update(zip(mapping.hf, parts, strict=True))
    return masks


def hf_weights(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint: Hugging Face name -> tensor."""
    checkpoint = resolve(path)
    weights = {}
    for mapping in parameter_map(checkpoint.model_config):
        parts = mapping.to_hf(checkpoint.tensors[mapping.megatron].load(), checkpoint.model_config)
        weights.update(zip(mapping.hf, parts, strict=True))
    return weights


def assert_same(one: Path, other: Path) -> None:
    """Two prunings of `tiny_dense` have the same masks and the same weights, bit for bit."""
    for read in (hf_masks, hf_weights):
        expected, found = read(one), read(other)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(hf_masks(one)) == 28


def calibrated(dataset: str | Path, method: str, *options: object) -> list[str]:
    """Options of `maskllm prune` for few and short samples in fp32. `options` come last and override them."""
    few = ["--calibration-samples", "6", "--seq-length", "48", "--seed", "3", "--params-dtype", "fp32"]
    return ["--method", method, "--calibration-data", str(dataset), *few, *map(str, options)]


def prune(load: str | Path, output: str | Path, *options: object) -> int:
    """Run `maskllm prune`; returns its exit status."""
    return main(["prune", "--load", str(load), "--output", str(output), *map(str, options)])
