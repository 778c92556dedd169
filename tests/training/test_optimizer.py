"""Groups of parameters under Megatron's optimizer: each moves at its own rate."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from maskllm.checkpoints.reading import load_model, resolve
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model
from maskllm.megatron.linears import attach_logits, masked_parameters
from maskllm.megatron.process_groups import parallel_processes
from maskllm.patterns import Pattern
from maskllm.training.arguments import TrainArguments
from maskllm.training.data_parallel import data_parallel
from maskllm.training.optimizer import LogitsOptimizer, build_lr_scheduler, build_optimizer, clip_and_step, unchained
from maskllm.training.trainables import ParameterGroup, parameter_groups

ARGUMENTS = TrainArguments(
    data_path=["data"], load="checkpoint", train_iters=10, global_batch_size=2, lr=0.1, min_lr=0.01, lr_decay_style="linear",
    weight_decay=0.0, adam_eps=0.0, clip_grad=0.0, params_dtype="fp32",
)  # fmt: skip


@pytest.fixture
def model(tiny_dense):
    """A model with learnable logits, in its process group."""
    with parallel_processes():
        checkpoint = resolve(tiny_dense)
        model = build_model(checkpoint.model_config, params_dtype=torch.float32)
        load_model(checkpoint, model)
        attach_logits(model, MaskSampler(Pattern(2, 4)))
        yield model


@pytest.mark.parametrize("options", [{}, {"use_distributed_optimizer": True}], ids=["plain", "distributed"])
def test_two_groups_move_at_their_own_rates(options, model):
    """Adam's first step without epsilon moves an entry by the learning rate, whatever its gradient's size."""
    arguments = dataclasses.replace(ARGUMENTS, **options)
    masked = masked_parameters(model)
    (all_logits,) = parameter_groups(arguments, model, masked)
    groups = [
        dataclasses.replace(all_logits, parameters=all_logits.parameters[:3]),
        ParameterGroup("other", all_logits.parameters[3:], lr=0.02, min_lr=0.004, weight_decay=0.0, master_dtype=torch.float32),
    ]
    wrapped = data_parallel(arguments, model)
    optimizer = build_optimizer(arguments, groups, masked, wrapped)
    scheduler = build_lr_scheduler(arguments, optimizer)

    def moved(fill: float) -> tuple[torch.Tensor, torch.Tensor]:
        before = [parameter.detach().clone() for parameter in all_logits.parameters]
        wrapped.zero_grad_buffer()
        for parameter in all_logits.parameters:
            parameter.main_grad.fill_(fill)
        wrapped.finish_grad_sync()
        assert optimizer.step()[0]
        steps = [one - parameter.detach() for one, parameter in zip(before, all_logits.parameters, strict=True)]
        return torch.cat([step.flatten() for step in steps[:3]]), torch.cat([step.flatten() for step in steps[3:]])

    for rates in ((0.1, 0.02), (0.1 - 0.09 * 0.5, 0.02 - 0.016 * 0.5)):  # the second after half of the steps
        for steps, rate in zip(moved(3.0), rates, strict=True):
            torch.testing.assert_close(steps, torch.full_like(steps, rate), rtol=1e-4, atol=1e-6)
        scheduler.step(5 * arguments.global_batch_size)


@pytest.mark.parametrize("options", [{}, {"use_distributed_optimizer": True}], ids=["plain", "distributed"])
def test_logits_are_clipped_apart_from_weights(options, model):
    arguments = dataclasses.replace(ARGUMENTS, train="both", clip_grad=1.0, **options)
    masked = masked_parameters(model)
    groups = parameter_groups(arguments, model, masked)
    logits, weights = ([p for group in part for p in group.parameters] for part in (groups[:1], groups[1:]))
    wrapped = data_parallel(arguments, model)
    optimizer = build_optimizer(arguments, groups, masked, wrapped)
    wrapped.zero_grad_buffer()
    expected = []
    for parameters, fill in ((logits, 100.0), (weights, 1e-4)):
        for parameter in parameters:
            parameter.main_grad.fill_(fill)
        expected.append(fill * sum(parameter.numel() for parameter in parameters) ** 0.5)
    wrapped.finish_grad_sync()
    assert clip_and_step(optimizer, groups) == pytest.approx(expected, rel=1e-5)
    assert expected[1] < 1 < expected[0]
    first, *others = (group["params"] for group in unchained(optimizer).optimizer.param_groups)
    assert torch.cat([parameter.grad.flatten() for parameter in first]).norm() == pytest.approx(1.0, rel=1e-3)
    assert all(bool((parameter.grad == 1e-4).all()) for group in others for parameter in group)


def test_one_group_is_what_megatron_makes_of_the_whole_model(model):
    masked = masked_parameters(model)
    wrapped = data_parallel(ARGUMENTS, model)
    config = OptimizerConfig(lr=0.1, min_lr=0.01, weight_decay=0.0, adam_beta2=0.95, adam_eps=0.0, clip_grad=0.0)
    (expected,) = get_megatron_optimizer(config, [wrapped]).param_groups
    (found,) = build_optimizer(ARGUMENTS, parameter_groups(ARGUMENTS, model, masked), masked, wrapped).param_groups
    assert len(found["params"]) == len(masked) == 4 * 4
    assert {id(parameter) for parameter in found["params"]} == {id(one.logits) for one in masked}
    assert found.pop("fused") and found["lr"] == 0.1
    assert found == {name: value for name, value in expected.items() if name != "fused"}


@pytest.mark.parametrize(("name", "value"), [("mask_logits_dtype", "bf16"), ("optimizer_state_dtype", "8bit")])
def test_low_precision_takes_this_projects_optimizer(name, value, model):
    arguments = dataclasses.replace(ARGUMENTS, **{name: value})
    masked = masked_parameters(model)
    optimizer = build_optimizer(arguments, parameter_groups(arguments, model, masked), masked, data_parallel(arguments, model))
    assert isinstance(optimizer, LogitsOptimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "options", [{}, {"use_distributed_optimizer": True}, {"mask_logits_dtype": "bf16"}], ids=["plain", "distributed", "own"]
)
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_no_optimizer_refuses_a_gradient_that_is_not_finite(options, clip_grad, model):
    """So a step has to look at the gradients itself, before the optimizer does."""
    arguments = dataclasses.replace(ARGUMENTS, clip_grad=clip_grad, **options)
    masked = masked_parameters(model)
    wrapped = data_parallel(arguments, model)
    optimizer = build_optimizer(arguments, parameter_groups(arguments, model, masked), masked, wrapped)
    wrapped.zero_grad_buffer()
    masked[0].logits.main_grad.fill_(torch.nan)
    wrapped.finish_grad_sync()
    assert optimizer.step()[0] is True
    assert masked[0].logits.isnan().any()
