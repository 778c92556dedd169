"""The most memory that pruning takes is what docs/pruning.md accounts for."""

from __future__ import annotations

from benchmarks.prune_memory import Shape, account, measure, write_model


def test_the_solves_peak_is_the_accounted_one(tmp_path):
    """All allocations by PyTorch, those inside its operators too; two layers, so that what the first leaves behind would be seen."""
    shape = Shape(hidden=256, mlp=1024, heads=2, samples=2, seq_length=32, layers=2)
    write_model(shape, tmp_path)
    accounted = account(shape)
    assert accounted["solving"] > 2 * accounted["calibrating"], "the shape does not show the solve"
    measured = measure(shape, tmp_path)
    assert measured <= accounted["solving"] + accounted["host"] + (1 << 18)
    assert measured >= 0.98 * accounted["solving"], "the account is larger than what is taken"
