"""Optional parts are named, and Transformer Engine is never stood in for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from maskllm.cli.train_options import parse_arguments
from maskllm.environment.optional_parts import OptionalPart, resolve_transformer_impl, slow_dtype, startup_line, transformer_engine
from maskllm.errors import MaskLLMError
from maskllm.megatron.attention import SDPACoreAttention
from maskllm.megatron.linears import MaskedColumnParallelLinear, MaskedRowParallelLinear
from maskllm.megatron.norm import LocalNorm
from maskllm.megatron.spec import masked_layer_spec
from maskllm.training.arguments import TrainArguments

has_transformer_engine = importlib.util.find_spec("transformer_engine") is not None
without = pytest.mark.skipif(has_transformer_engine, reason="Transformer Engine is installed here")


@without
def test_transformer_engine_is_refused_where_it_is_not_installed():
    arguments = parse_arguments(["--data-path", "data", "--load", "checkpoint", "--transformer-impl", "transformer_engine"])
    with pytest.raises(MaskLLMError, match=r"--transformer-impl transformer_engine: transformer-engine: not installed; .* local"):
        arguments.check()


def test_an_unknown_implementation_is_refused():
    with pytest.raises(MaskLLMError, match="--transformer-impl apex: wanted one of local, transformer_engine"):
        TrainArguments(data_path=["data"], load="checkpoint", transformer_impl="apex").check()
    with pytest.raises(SystemExit):
        parse_arguments(["--data-path", "data", "--transformer-impl", "apex"])


@without
def test_without_it_the_default_is_local_and_the_start_names_what_is_missing():
    assert resolve_transformer_impl(None) == resolve_transformer_impl("local") == "local"
    line = startup_line("local")
    assert "; norms are torch's, attention is torch's (--transformer-impl local), Adam is torch's; " in line
    assert "transformer-engine: not installed; it would bring fused norms, attention and Adam" in line
    assert "apex: not installed; it would bring fused norms and Adam" in line
    assert "Adam is MaskLLM's; " in startup_line("local", low_precision=True)


@pytest.fixture
def apex_is_there(monkeypatch):
    """Apex as it would be beside a CUDA device; torch's norms stand in for its fused ones."""
    monkeypatch.setattr("maskllm.environment.optional_parts.apex", lambda: OptionalPart("apex", "", "0.1", None))
    module = types.ModuleType("apex.normalization")
    module.FusedRMSNorm = type("FusedRMSNorm", (torch.nn.RMSNorm,), {})
    module.FusedLayerNorm = type("FusedLayerNorm", (torch.nn.LayerNorm,), {})
    monkeypatch.setitem(sys.modules, "apex.normalization", module)
    monkeypatch.setattr("megatron.core.optimizer.Adam", type("FusedAdam", (), {"__module__": "apex.optimizers.fused_adam"}))


@without
@pytest.mark.parametrize(
    ("normalization", "zero_centered", "kind"),
    [("RMSNorm", False, "FusedRMSNorm"), ("LayerNorm", False, "FusedLayerNorm"), ("LayerNorm", True, "ZeroCenteredLayerNorm")],
)
def test_apex_serves_where_there_is_no_transformer_engine(normalization, zero_centered, kind, apex_is_there):
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, normalization=normalization, use_cpu_initialization=True,
        layernorm_zero_centered_gamma=zero_centered, params_dtype=torch.bfloat16,
    )  # fmt: skip
    norm = LocalNorm(config, 8, eps=1e-6)
    assert (type(norm).__name__, norm.eps, norm.weight.dtype) == (kind, 1e-6, torch.bfloat16)
    line = startup_line("local")
    assert "norms are Apex's, attention is torch's (--transformer-impl local), Adam is Apex's; " in line
    assert "apex: " not in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_megatron_uses_nothing_that_needs_one(tmp_path):
    """As in a container that has Transformer Engine and Apex, on a machine without a GPU or with MODEL=tiny."""
    for package in ("transformer_engine", "apex"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    (tmp_path / "amp_C.py").write_text("")
    code = """
import megatron_patches
megatron_patches.import_megatron()
import torch
import megatron.core.optimizer
from maskllm.environment.optional_parts import startup_line
assert megatron.core.optimizer.Adam is torch.optim.AdamW
print(startup_line("local"))
"""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for package in ("transformer-engine", "apex"):
        assert f"; {package}: needs a CUDA device, and there is none; it would bring " in done.stdout


def test_the_start_names_the_device_and_the_backend(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert startup_line("local").startswith("CPU with gloo, no GPU visible; norms are ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert startup_line("local").startswith("NVIDIA H100 with NCCL; norms are ")


def test_the_start_names_kernels_that_are_not_built(monkeypatch):
    monkeypatch.setattr("maskllm.ops.extension.has_kernels", lambda device_type: False)
    assert "kernels: not built; they would bring masks several times faster" in startup_line("local")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_type_that_the_cpu_has_no_instructions_for_is_named(monkeypatch):
    for supported in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        slow = slow_dtype(torch.bfloat16)
        assert slow is None if supported else "no instructions for bfloat16" in slow and "--params-dtype fp32" in slow
        assert slow_dtype(torch.float32) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_an_installed_one_without_a_device_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert transformer_engine.__wrapped__().problem == "needs a CUDA device, and there is none"


def test_the_layers_of_both_implementations():
    """Upstream defines the names of its Transformer Engine modules whether or not that is installed."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

    for name, norm, attention in (
        ("local", LocalNorm, SDPACoreAttention),
        ("transformer_engine", TENorm, TEDotProductAttention),
    ):
        layer = masked_layer_spec(name).submodules
        assert layer.input_layernorm is layer.pre_mlp_layernorm is norm
        assert layer.self_attention.submodules.core_attention is attention
        assert layer.self_attention.submodules.linear_qkv is layer.mlp.submodules.linear_fc1 is MaskedColumnParallelLinear
        assert layer.self_attention.submodules.linear_proj is layer.mlp.submodules.linear_fc2 is MaskedRowParallelLinear
