"""Schedules of temperature, scale and regularization in mask learning (design section 2; MaskLLM, arXiv 2409.17481, section 4)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnnealingSchedule:
    """Temperature and scale change linearly from the first to the second end of their ranges, the regularizer's weight to zero.

    At step t of T (t = 0 .. T - 1) the completed fraction is t / T, as in the paper.
    """

    train_iters: int
    temperature_range: tuple[float, float] = (4.0, 0.05)
    scale_range: tuple[float, float] = (1e2, 5e2)
    weight_reg: float = 1e-5

    def _between(self, ends: tuple[float, float], iteration: int) -> float:
        return ends[0] + (ends[1] - ends[0]) * iteration / self.train_iters

    def temperature(self, iteration: int) -> float:
        """The softmax temperature tau at step `iteration`."""
        return self._between(self.temperature_range, iteration)

    def scale(self, iteration: int) -> float:
        """The logits' scale kappa at step `iteration`."""
        return self._between(self.scale_range, iteration)

    def weight_reg_at(self, iteration: int) -> float:
        """The regularizer's weight lambda at step `iteration`."""
        return self._between((self.weight_reg, 0.0), iteration)
