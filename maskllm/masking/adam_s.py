"""AdamS, the optimizer of CAST (arXiv 2509.25996, section IV-A and algorithm 1): Adam with an L1 decay of the weights outside of the
mask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

CHUNK = 1 << 22
"""Entries that are updated at once. Their temporary fp32 copies take a few times 16 MiB, whatever the tensor's size."""


class AdamS(torch.optim.AdamW):
    """Adam in which the weights outside of their N:M mask decay toward zero, by way of both moments.

    With g the gradient and t = 1, 2, ... the step (algorithm 1, lines 10 to 21):

        mu   = beta1 * mu + (1 - beta1) * g
        mu~  = mu                                             inside of the mask
        mu~  = (1 - alpha) * mu + alpha * lambda * sign(w)    outside of it
        v    = beta2 * v + (1 - beta2) * mu~^2
        w    = w - lr * (mu~ / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The second moment is that of mu~, not of g, for all weights with a mask. mu holds gradients alone: the decay of a step leaves no
    trace in it, so a weight that comes into the mask stops decaying at once. Parameters without a mask take AdamW's step. The decoupled
    weight decay of a group acts before either.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        kept: Mapping[torch.Tensor, Callable[[], torch.Tensor]],
        decay: float,
    ) -> None:
        """Take over groups of parameters with `lr`, `betas`, `eps` and `weight_decay`; the dictionaries stay the same objects.

        Args:
            params: the groups.
            kept: of the parameters with a mask: a function that gives the mask now, bool, with as many entries as the parameter.
            decay: lambda, the strength of the decay at the end of the run, in the unit of gradients.
        """
        groups = list(params)
        # Megatron's distributed optimizer updates slices of parameters, which torch would refuse.
        super().__init__([{**group, "params": []} for group in groups])
        for group, complete in zip(groups, self.param_groups, strict=True):
            group.update({name: value for name, value in complete.items() if name not in group})
        self.param_groups = groups
        self.kept = dict(kept)
        self.decay = decay
        self.alpha = 0.0
        """The share of the run that is done, from 0 to 1. Whoever steps sets it before each step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.kept and parameter.grad is not None:
                    self._update(parameter, group)
                    gradients[parameter], parameter.grad = parameter.grad, None
        super().step()  # passes over parameters without a gradient
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        steps, (beta1, beta2), lr = int(state["step"]), group["betas"], group["lr"]
        whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], self.kept[parameter]())
        for weight, gradient, mean, square, kept in zip(*(each.view(-1).split(CHUNK) for each in whole), strict=True):
            mean.lerp_(gradient, 1 - beta1)
            decayed = torch.where(kept, mean, torch.lerp(mean, self.decay * weight.sign(), self.alpha))
            square.mul_(beta2).addcmul_(decayed, decayed, value=1 - beta2)
            weight.mul_(1 - lr * group["weight_decay"])
            denominator = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
            weight.addcdiv_(decayed, denominator, value=-lr / (1 - beta1**steps))
