"""`python -m maskllm.train` on a CPU with an Adam that keeps its state as those of Apex and Transformer Engine do.

usage: ranks(1, "tests.training.fused_adam_worker", ARGUMENTS...)
"""

from __future__ import annotations

import contextlib
import sys
from unittest import mock

import torch

import megatron_patches

megatron_patches.import_megatron()

from megatron.core import optimizer  # noqa: E402
from megatron.core.optimizer import distrib_optimizer  # noqa: E402

from maskllm.train import main  # noqa: E402


class FusedAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay. As in Apex, the group counts the steps and has the option `bias_correction`."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_: object) -> None:
        super().__init__(
            params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            assert group["bias_correction"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                denominator = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
                parameter.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1**step))


if __name__ == "__main__":
    with contextlib.ExitStack() as patches:
        for module, values in (
            (optimizer, {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False}),
            (distrib_optimizer, {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_APEX_OPTIMIZER": True}),
        ):
            for name, value in values.items():
                patches.enter_context(mock.patch.object(module, name, value))
        sys.exit(main())
