"""The biases of row-parallel linears, which upstream adds after the linear, among the trained parameters."""

from __future__ import annotations

import pytest
import torch

from maskllm.masking.draw import Draw, open_draw
from maskllm.megatron.build import build_model
from maskllm.megatron.linears import attach_bits, masked_parameters
from maskllm.megatron.process_groups import parallel_processes
from maskllm.planning.models import config_of
from maskllm.training.arguments import TrainArguments
from maskllm.training.trainables import parameter_groups

GPT = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16}


@pytest.mark.parametrize("modules", [None, ["mlp"], ["core_attn"]], ids=str)
def test_all_trained_parameters_get_a_gradient(modules):
    settings = {} if modules is None else {"recompute_granularity": "selective", "recompute_modules": modules}
    arguments = TrainArguments(train="weights", params_dtype="fp32", **settings)
    with parallel_processes():
        model = build_model(config_of(GPT), params_dtype=arguments.dtype, recomputation=arguments.recomputation())
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data, std=0.02)
        attach_bits(model)
        for parameter in masked_parameters(model):
            parameter.bits.fill_(0b10100101)
        parameter_groups(arguments, model, masked_parameters(model))
        tokens = torch.randint(64, (1, 16))
        with open_draw(Draw(0)):
            model(tokens, torch.arange(16)[None], None, labels=tokens).mean.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "decoder.layers.1.mlp.linear_fc2.bias" in trained
    without = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    assert without == []
