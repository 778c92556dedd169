"""The labels of a batch, in line with the model's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from maskllm.errors import MaskLLMError
from maskllm.masking.distillation import divergence

IGNORED = -100
"""The label of a token that no loss counts, as in transformers."""


class Labels:
    """What the predictions of a batch are compared with."""

    def __init__(self, inputs: Mapping[str, Any], *, shifted: bool) -> None:
        """`shifted`: the prediction at a token is that of the next token's label, as in causal language models."""
        labels = inputs.get("shift_labels")
        self._shifted = shifted and labels is None
        if labels is None:
            labels = inputs.get("labels")
        self._labels = labels[..., 1:] if self._shifted and labels is not None else labels
        self.count: int | None = None if self._labels is None else int((self._labels != IGNORED).sum())
        """How many labels count; None without labels. Trainer counts so too (`num_items_in_batch`)."""

    def mean_divergence(self, logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
        """The mean of T^2 * KL(teacher || student) over the predictions whose label counts, an fp32 scalar; over all without labels.

        `logits` and `target`, the teacher's, are [batch, ..., classes]. Raises MaskLLMError if they have different shapes.
        """
        if logits.shape != target.shape:
            raise MaskLLMError(
                f"teacher: its predictions are {list(target.shape)}, the student's {list(logits.shape)}; wanted the same shape"
            )
        if self._shifted and self._labels is not None:
            logits, target = logits[:, :-1], target[:, :-1]
        logits, target = logits.flatten(0, -2), target.flatten(0, -2)
        if self._labels is not None and self._labels.numel() == len(logits):
            counted = self._labels.flatten() != IGNORED
            logits, target = logits[counted], target[counted]
        return divergence(logits, target, temperature).sum() / max(1, len(logits))
