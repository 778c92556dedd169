"""What is trained: groups of parameters, each with its learning rate and type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maskllm.masking.parameter import MaskedParameter
from maskllm.megatron.gpt import MaskedGPTModel
from maskllm.training.arguments import TrainArguments

MASK_LOGITS = "mask_logits"
"""The name of the group of logits, and the last part of each one's name."""
WEIGHT_SCALES = "weight_scales"
"""The name of the group of the scales of CAST, and the last part of each one's name."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained alike."""

    name: str
    parameters: tuple[torch.nn.Parameter, ...]
    lr: float
    """The highest learning rate."""
    min_lr: float
    """The learning rate at the end."""
    weight_decay: float
    """Decoupled weight decay."""
    master_dtype: torch.dtype
    """The type of the numbers that the optimizer updates."""


def parameter_groups(arguments: TrainArguments, model: MaskedGPTModel, masked: Sequence[MaskedParameter]) -> list[ParameterGroup]:
    """The groups that a run trains, in the order of Megatron's optimizer: the logits of `masked`, and the weights with their scales,
    norms and biases.

    `--train-embeddings` adds the embeddings and the output layer to the weights, and the final norm to the norms. All other parameters
    of `model` are frozen.
    """
    groups = []
    if arguments.trains_masks:
        groups.append(
            ParameterGroup(
                MASK_LOGITS,
                tuple(parameter.logits for parameter in masked),
                lr=arguments.lr,
                min_lr=arguments.min_lr,
                weight_decay=arguments.weight_decay,
                master_dtype=arguments.logits_dtype,
            )
        )
    if arguments.trains_weights:
        named = {name: parameter for name, parameter in model.named_parameters() if is_trained(name, arguments)}
        scales = [parameter for name, parameter in named.items() if name.endswith(f".{WEIGHT_SCALES}")]
        trained = [parameter for name, parameter in named.items() if not name.endswith(f".{WEIGHT_SCALES}")]
        decay = arguments.weights_weight_decay
        # Megatron sorts its groups by their settings, and groups with the same settings are one.
        parts = {
            "norms_and_biases": [each for each in trained if each.dim() == 1],
            "weights": [each for each in trained if each.dim() > 1],
        }
        parts = parts if decay else {"weights": trained}
        # Scales are fp32 even if the weights are not, so they are a group of their own.
        for name, members in (({WEIGHT_SCALES: scales} if arguments.uses_cast else {}) | parts).items():
            groups.append(
                ParameterGroup(
                    name,
                    tuple(members),
                    lr=arguments.weights_lr,
                    min_lr=arguments.weights_min_lr,
                    weight_decay=decay if name == "weights" else 0.0,
                    master_dtype=torch.float32,
                )
            )
    for parameter in (parameter for group in groups for parameter in group.parameters):
        parameter.requires_grad_()
    return groups


def is_trained(name: str, arguments: TrainArguments) -> bool:
    """Whether the parameter `name` is a weight, a scale, a norm or a bias that this run trains."""
    return (
        arguments.trains_weights
        and not name.endswith(f".{MASK_LOGITS}")
        and (name.startswith("decoder.layers.") or arguments.train_embeddings)
    )
