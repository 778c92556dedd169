"""Adam for mask logits and moments in low precision.

The 8-bit optimizers of torchao and bitsandbytes do not fit, for two reasons. They round with the global random generator, so a
resumed run or another parallel layout would round differently. They also hold whole tensors in fp32 during a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from maskllm.ops import NoiseKey, ShardMap, rounding_bits, stochastic_bf16
from maskllm.training.moments import QUANTIZATION_BLOCK, BlockwiseMoment, FloatMoment

CHUNK = 1 << 22
"""About how many entries are updated at once. Temporary fp32 copies take a few times 16 MiB, whatever the tensor's size."""


@dataclass(frozen=True)
class Place:
    """What determines the random numbers of a parameter's rounding: its layer and the position of its blocks in the whole tensor."""

    key: int
    """The Philox key for the rounding of this layer."""
    shard: ShardMap
    """The position of this rank's blocks."""


class LogitsAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), in fp32 arithmetic, for parameters in fp32 or bf16.

    A bf16 parameter is rounded stochastically. Rounding to nearest would lose every step below half of its last digit. The random
    numbers depend only on seed, layer, block, candidate and step (`maskllm.ops.rounding`), so a resumed run and another parallel
    layout round in the same way.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        state_dtype: str,
        places: dict[torch.nn.Parameter, Place],
    ) -> None:
        """Create zero moments for all parameters.

        Args:
            params: Parameter groups with `lr`, `weight_decay`, `betas` and `eps`. Parameters are [rows, blocks per row, candidates].
            state_dtype: How to store the moments: fp32, bf16 or 8bit.
            places: Must have an entry for each bf16 parameter.
        """
        super().__init__(params, {})
        self.places = places
        self.steps = 0
        self.grad_scale = 1.0
        """The next step multiplies the gradients by this factor."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "exp_avg": _moment(state_dtype, parameter, signed=True),
                    "exp_avg_sq": _moment(state_dtype, parameter, signed=False),
                }

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Gradients may have any float dtype."""
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.nn.Parameter, group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        first, second = self.state[parameter]["exp_avg"], self.state[parameter]["exp_avg_sq"]
        values, gradients = parameter.view(-1), parameter.grad.view(-1)
        # A chunk consists of whole quantization blocks and of all candidates of each N:M block in it.
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
