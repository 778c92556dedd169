"""The statistics of a linear layer's inputs that calibration collects: their second moments."""

from __future__ import annotations

import torch
from torch import distributed as dist

_STRIP = 512
"""Columns multiplied at a time. Strips of the lower triangle need half the work of the whole symmetric product."""

_MAX_SQUARED_NORM = 1e34
"""A token with larger inputs counts as not finite: the sum over a sample could overflow in fp32."""


class InputStatistics:
    """The Gram matrix `sum over tokens of x x^T` of one linear layer's inputs.

    It serves every method: its diagonal is Wanda's sum of squares, twice its mean over samples is SparseGPT's Hessian, and
    `trace(D G D^T)` is the squared output error ||D X||^2 of a change D in the weight.

    Each sample's product is computed in fp32 and added in fp64. Sums of fp32 numbers in fp64 are almost always exact, so the result
    does not depend on the order of the samples or on how the ranks split them.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.gram = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        """fp64 [in, in]. Only the lower triangle is valid."""
        self.samples = 0
        self.tokens = 0
        self.skipped_tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add one sample's inputs [..., in] of any float dtype. Tokens with a non-finite input are counted and skipped."""
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        usable = inputs.square().sum(dim=1) < _MAX_SQUARED_NORM  # false for NaN
        if not usable.all():
            self.skipped_tokens += int((~usable).sum())
            inputs = inputs[usable]
        for start in range(0, len(self.gram), _STRIP):
            self.gram[start:, start : start + _STRIP] += inputs[:, start:].t() @ inputs[:, start : start + _STRIP]
        self.samples += 1
        self.tokens += len(inputs)

    def copy(self) -> InputStatistics:
        """The same statistics in memory of their own."""
        copied = InputStatistics(0, self.gram.device)
        copied.gram = self.gram.clone()
        copied.samples, copied.tokens, copied.skipped_tokens = self.samples, self.tokens, self.skipped_tokens
        return copied

    def reduce(self, destination: int, group: dist.ProcessGroup) -> None:
        """Sum the statistics of the ranks in `group` on its rank `destination`. Each rank has seen other samples."""
        dist.reduce(self.gram, group_dst=destination, group=group)
        counts = torch.tensor([self.samples, self.tokens, self.skipped_tokens], device=self.gram.device)
        dist.reduce(counts, group_dst=destination, group=group)
        self.samples, self.tokens, self.skipped_tokens = counts.tolist()

    def hessian(self) -> torch.Tensor:
        """SparseGPT's Hessian, the mean of 2 X X^T over samples, fp32 [in, in]. It is the identity if no token was finite."""
        if self.tokens == 0:
            return torch.eye(len(self.gram), device=self.gram.device)
        hessian = self.gram.float().tril_().mul_(2 / self.samples)
        return hessian.add_(hessian.tril(-1).t())
