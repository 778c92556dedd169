"""Annealing: linear between the ends of each range."""

from __future__ import annotations

import pytest

from maskllm.masking.schedules import AnnealingSchedule


def test_annealing_is_linear_between_its_ends():
    schedule = AnnealingSchedule(train_iters=2000)
    assert schedule.temperature(0) == 4.0
    assert schedule.temperature(1000) == pytest.approx((4 + 0.05) / 2)
    assert schedule.temperature(2000) == pytest.approx(0.05)
    assert schedule.scale(500) == pytest.approx(200)
    assert schedule.weight_reg_at(0) == 1e-5
    assert schedule.weight_reg_at(1500) == pytest.approx(2.5e-6)
