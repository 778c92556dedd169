"""The loss on validation text: with sampled masks, or with the dense weights that become sparse, and with the winners."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maskllm.distributed import device
from maskllm.masking.parameter import MaskedParameter, use_winners
from maskllm.masking.sampler import VALIDATION_SAMPLES, MaskSampler
from maskllm.training.data import Batches
from maskllm.training.micro_batches import MeanLosses, MicroBatches, mean_losses
from maskllm.training.surviving.stopping import Stopping


@dataclass
class Validation:
    """Evaluates the model on `eval_iters` batches, always the same ones with the same draws."""

    model: torch.nn.Module
    sampler: MaskSampler
    masked: Sequence[MaskedParameter]
    micro_batches: MicroBatches
    batches: Batches
    eval_iters: int
    stopping: Stopping

    def __call__(self) -> dict[str, float] | None:
        """The mean losses, the same on every rank; None if a signal stopped the validation.

        Losses with sampled masks are called "sampled", with CAST's dense weights "dense", with the winners or the fixed masks "winner".
        """
        self.sampler.stats = None
        self.sampler.weight_reg = 0.0
        self.model.eval()
        try:
            means = {}
            kinds = {"winner": use_winners(self.masked)}
            if self.masked[0].sampler is not None:
                before = "sampled" if self.masked[0].logits is not None else "dense"
                kinds = {before: contextlib.nullcontext()} | kinds
            for name, masks in kinds.items():
                with masks:
                    mean = self._mean_losses()
                if mean is None:
                    return None
                means[f"loss_{name}"] = mean.cross_entropy
                means |= {f"{term}_{name}": getattr(mean, term) for term in self.micro_batches.objective.teacher_terms}
            return means
        finally:
            self.model.train()

    def _mean_losses(self) -> MeanLosses | None:
        losses = torch.zeros(4, dtype=torch.float64, device=device())
        for batch in range(self.eval_iters):
            first = batch * self.micro_batches.per_step
            with torch.no_grad():
                losses += self.micro_batches.run(
                    self.batches,
                    first,
                    sample_of=lambda index, first=first: VALIDATION_SAMPLES + first + index,
                    forward_only=True,
                )
            if self.stopping.agree_on_signals():
                return None
        return mean_losses(losses)
