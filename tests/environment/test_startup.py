"""The line that a run prints when it starts."""

from __future__ import annotations

import pytest
import torch

from maskllm.environment import startup
from maskllm.environment.optional_parts import OptionalPart

MISSING = OptionalPart("apex", "fused norms and Adam", None, "not installed")
INSTALLED = OptionalPart("apex", "fused norms and Adam", "0.1", None)


@pytest.fixture(autouse=True)
def without_optional_parts(monkeypatch):
    missing = OptionalPart("transformer-engine", "fused norms, attention and Adam", None, "not installed")
    monkeypatch.setattr(startup, "transformer_engine", lambda: missing)
    monkeypatch.setattr(startup, "apex", lambda: MISSING)
    monkeypatch.setattr(startup, "uses_apex_norms", lambda: False)
    monkeypatch.setattr("megatron.core.optimizer.Adam", torch.optim.AdamW)


def test_missing_parts_are_named_with_what_they_bring():
    line = startup.startup_line("local")
    assert "; norms are torch's, attention is torch's (--transformer-impl local), Adam is torch's; " in line
    assert "transformer-engine: not installed; it would bring fused norms, attention and Adam" in line
    assert "apex: not installed; it would bring fused norms and Adam" in line


def test_low_precision_uses_this_projects_adam():
    assert "Adam is MaskLLM's; " in startup.startup_line("local", own_adam=True)


def test_apex_is_named_if_it_is_used(monkeypatch):
    monkeypatch.setattr(startup, "apex", lambda: INSTALLED)
    monkeypatch.setattr(startup, "uses_apex_norms", lambda: True)
    monkeypatch.setattr("megatron.core.optimizer.Adam", type("FusedAdam", (), {"__module__": "apex.optimizers.fused_adam"}))
    line = startup.startup_line("local")
    assert "norms are Apex's, attention is torch's (--transformer-impl local), Adam is Apex's; " in line
    assert "apex: " not in line


def test_the_device_and_the_backend_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert startup.startup_line("local").startswith("CPU with gloo, no GPU visible; norms are ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert startup.startup_line("local").startswith("NVIDIA H100 with NCCL; norms are ")


def test_kernels_that_are_not_built_are_named(monkeypatch):
    monkeypatch.setattr("maskllm.ops.extension.has_kernels", lambda device_type: False)
    assert "kernels: not built; they would bring masks several times faster" in startup.startup_line("local")
