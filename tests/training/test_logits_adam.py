"""The logits' Adam against torch's AdamW, and its low-precision moments."""

from __future__ import annotations

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig

from maskllm.megatron.process_groups import parallel_processes
from maskllm.ops import ShardMap
from maskllm.training import logits_adam
from maskllm.training.logits_adam import LogitsAdam, Place
from maskllm.training.moments import QUANTIZATION_BLOCK, BlockwiseMoment, code_levels
from maskllm.training.optimizer import LogitsOptimizer

SHAPE = (24, 50, 6)
GROUP = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-5}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one shorter."""
    monkeypatch.setattr(logits_adam, "CHUNK", 3000)


def gradients(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 0, SHAPE[0])[:, None, None]
    return [torch.randn(SHAPE, generator=generator) * sizes for _ in range(steps)]


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)) * 0.03


def learn(dtype: torch.dtype, state_dtype: str, steps: int) -> torch.Tensor:
    parameter = torch.nn.Parameter(start().to(dtype))
    places = {parameter: Place(5, ShardMap(50))}
    optimizer = LogitsAdam([{"params": [parameter], **GROUP}], state_dtype=state_dtype, places=places)
    for gradient in gradients(steps):
        parameter.grad = gradient.to(dtype)
        optimizer.step()
    return parameter.detach()


def reference(steps: int) -> torch.Tensor:
    parameter = torch.nn.Parameter(start().double())
    optimizer = torch.optim.AdamW([parameter], **GROUP)
    for gradient in gradients(steps):
        parameter.grad = gradient.double()
        optimizer.step()
    return parameter.detach()


def test_fp32_is_adamw():
    torch.testing.assert_close(learn(torch.float32, "fp32", 20).double(), reference(20), rtol=1e-5, atol=1e-7)


def test_gradients_are_scaled():
    parameter = torch.nn.Parameter(start())
    other = torch.nn.Parameter(start())
    optimizer = LogitsAdam([{"params": [parameter], **GROUP}], state_dtype="fp32", places={})
    plain = torch.optim.AdamW([other], **GROUP)
    for gradient in gradients(3):
        parameter.grad, other.grad = gradient, gradient * 0.25
        optimizer.grad_scale = 0.25
        optimizer.step()
        plain.step()
    torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_wrapper_clips_as_torch_does(clip, dtype):
    """A step with gradients in `main_grad`. It returns the norm before clipping."""
    parameter, other = (torch.nn.Parameter(start().to(dtype)) for _ in range(2))
    parameter.main_grad = gradients(1)[0].to(dtype)
    parameter.tensor_model_parallel = True
    plain = LogitsAdam([{"params": [other], **GROUP}], state_dtype="fp32", places={other: Place(5, ShardMap(50))})
    other.grad = parameter.main_grad.float().to(dtype)
    norm = other.grad.float().norm().item()
    plain.grad_scale = clip / norm if clip else 1.0
    plain.step()
    with parallel_processes():
        inner = LogitsAdam([{"params": [parameter], **GROUP}], state_dtype="fp32", places={parameter: Place(5, ShardMap(50))})
        updated, found, _ = LogitsOptimizer(inner, OptimizerConfig(clip_grad=clip)).step()
    assert updated and found == pytest.approx(norm, rel=1e-5) and norm > 0.5
    torch.testing.assert_close(parameter, other, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize(("state_dtype", "share"), [("bf16", 0.02), ("8bit", 0.2)])
def test_low_precision_moments_move_parameters_almost_as_adamw_does(state_dtype, share):
    """After 20 steps, the difference to AdamW's parameters is a small share of the distance from the start."""
    expected = reference(20) - start()
    found = learn(torch.float32, state_dtype, 20) - start()
    assert (found - expected).norm() < share * expected.norm()


def test_bf16_parameters_move_by_steps_below_half_their_spacing():
    """Each step is about 2e-5, and half the spacing of bf16 numbers at 0.03 is 6e-5. Rounding to nearest would undo every step."""
    parameter = torch.nn.Parameter(torch.full((40, 50, 6), 0.03, dtype=torch.bfloat16))
    first = parameter.detach().float().mean()
    group = GROUP | {"lr": 2e-5, "weight_decay": 0.0}
    optimizer = LogitsAdam([{"params": [parameter], **group}], state_dtype="fp32", places={parameter: Place(5, ShardMap(50))})
    for _ in range(50):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = parameter.detach().float() - first
    assert moved.mean().item() == pytest.approx(-50 * 2e-5, rel=0.05)
    assert moved.unique().numel() > 1


def test_rounding_is_the_same_in_a_shard_and_after_a_resume():
    whole = learn(torch.bfloat16, "fp32", 4)
    parameter = torch.nn.Parameter(start()[7:20, 10:30].to(torch.bfloat16).contiguous())
    shard = Place(5, ShardMap(50, block_offset=10, row_offset=7))

    def optimizer() -> LogitsAdam:
        return LogitsAdam([{"params": [parameter], **GROUP}], state_dtype="fp32", places={parameter: shard})

    before, after = optimizer(), optimizer()
    for step, gradient in enumerate(gradients(4)):
        if step == 2:
            after.steps = before.steps
            for name, moment in before.state[parameter].items():
                after.state[parameter][name].restore(moment.stored())
        parameter.grad = gradient[7:20, 10:30].to(torch.bfloat16).contiguous()
        (before if step < 2 else after).step()
    assert torch.equal(parameter, whole[7:20, 10:30])


@pytest.mark.parametrize("signed", [True, False])
def test_a_stored_8_bit_moment_comes_back_exactly(signed):
    torch.manual_seed(0)
    values = torch.randn(5000) * torch.logspace(-9, 2, 5000)
    values[300:900] = 0
    values[1000] = -1e3  # a block's largest magnitude is negative
    values = values if signed else values.square()
    moment, again = (BlockwiseMoment(len(values), torch.device("cpu"), signed=signed) for _ in range(2))
    assert not moment.stored().any()
    moment.write(slice(0, len(values)), values)
    again.restore(moment.stored())
    assert torch.equal(moment.codes, again.codes)
    assert torch.equal(moment.scales, again.scales)
    assert torch.equal(moment.stored(), again.stored())
    if not signed:
        assert torch.equal(moment.stored() > 0, values > 0)


@pytest.mark.parametrize("signed", [True, False])
def test_an_8_bit_moment_is_the_nearest_level_of_its_block(signed):
    torch.manual_seed(0)
    values = torch.randn(1000).abs() + (0 if not signed else torch.randn(1000))
    moment = BlockwiseMoment(1000, torch.device("cpu"), signed=signed)
    moment.write(slice(0, 1000), values)
    levels = code_levels(signed, torch.device("cpu")).double()
    assert len(levels.unique()) == 256
    for start_ in range(0, 1000, QUANTIZATION_BLOCK):
        block = values[start_ : start_ + QUANTIZATION_BLOCK].double()
        candidates = levels * block.abs().max()
        nearest = candidates[(block[:, None] - candidates).abs().argmin(1)]
        found = moment.read(slice(start_, min(1000, start_ + QUANTIZATION_BLOCK)))
        torch.testing.assert_close(found.double(), nearest, rtol=1e-6, atol=0)
