"""Adam for mask logits and moments that are kept in few bits.

torchao's and bitsandbytes' 8-bit optimizers round with the global generator, so that a resumed run or another layout would round
differently, and hold whole tensors in fp32 while they step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from maskllm.ops import NoiseKey, ShardMap, rounding_bits, stochastic_bf16
from maskllm.training.moments import QUANTIZATION_BLOCK, BlockwiseMoment, FloatMoment

CHUNK = 1 << 22
"""Entries updated at once, about: what is in fp32 for a moment is a few times 16 MiB, whatever the tensor's size."""


@dataclass(frozen=True)
class Place:
    """Where a parameter's blocks lie, for the random numbers of its rounding."""

    key: int
    """The Philox key of its layer's rounding."""
    shard: ShardMap


class LogitsAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in fp32 arithmetic, for parameters in fp32 or bf16.

    A bf16 parameter is rounded stochastically, or steps below half its last digit would never add up. The random numbers are a
    function of layer, block, candidate and step (`maskllm.ops.rounding`): a resumed run and another layout round alike.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        state_dtype: str,
        places: dict[torch.nn.Parameter, Place],
    ) -> None:
        """Take parameter groups with `lr`, `weight_decay`, `betas` and `eps`, of tensors [rows, blocks a row, candidates].

        `state_dtype` is fp32, bf16 or 8bit; `places` has an entry for each bf16 parameter.
        """
        super().__init__(params, {})
        self.places = places
        self.steps = 0
        self.grad_scale = 1.0
        """What the next step multiplies gradients by."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "exp_avg": _moment(state_dtype, parameter, signed=True),
                    "exp_avg_sq": _moment(state_dtype, parameter, signed=False),
                }

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, of any float type."""
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        first, second = self.state[parameter]["exp_avg"], self.state[parameter]["exp_avg_sq"]
        values, gradients = parameter.view(-1), parameter.grad.view(-1)
        # A chunk is whole quantization blocks and whole blocks of candidates.
        unit = QUANTIZATION_BLOCK * parameter.shape[-1]
        chunk = max(1, CHUNK // unit) * unit
        for start in range(0, values.numel(), chunk):
            entries = slice(start, min(values.numel(), start + chunk))
            gradient = gradients[entries].float() * self.grad_scale
            mean = first.read(entries).lerp_(gradient, 1 - beta1)
            square = second.read(entries).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            first.write(entries, mean)
            second.write(entries, square)
            denominator = square.div_(1 - beta2**self.steps).sqrt_().add_(group["eps"])
            updated = values[entries].float() * (1 - lr * group["weight_decay"])
            updated.addcdiv_(mean, denominator, value=-lr / (1 - beta1**self.steps))
            if parameter.dtype == torch.bfloat16:
                updated = stochastic_bf16(updated, self._bits(parameter, entries))
            values[entries] = updated

    def _bits(self, parameter: torch.nn.Parameter, entries: slice) -> torch.Tensor:
        place, (_, blocks, candidates) = self.places[parameter], parameter.shape
        key = NoiseKey(place.key, self.steps, place.shard)
        count = (entries.stop - entries.start) // candidates
        return rounding_bits(key, blocks, entries.start // candidates, count, candidates, parameter.device).view(-1)


def _moment(state_dtype: str, parameter: torch.nn.Parameter, *, signed: bool) -> FloatMoment | BlockwiseMoment:
    if state_dtype == "8bit":
        return BlockwiseMoment(parameter.numel(), parameter.device, signed=signed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[state_dtype]
    return FloatMoment(parameter.numel(), dtype, parameter.device)
