"""A student and its teacher as one Megatron model: both pass through the pipeline together, one micro-batch at a time.

Between pipeline stages the hidden states of both travel in one tensor, the student's sequences first. The divergence from the
teacher's predictions is computed with the cross-entropy (`maskllm.megatron.loss`). SquareHead (arXiv 2310.06927, section 3) compares
the hidden states after each layer, so each stage computes the terms of its own layers, in their backward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from maskllm.masking.distillation import squared_sums
from maskllm.masking.draw import current_draw, without_masks
from maskllm.megatron.gpt import MaskedGPTModel
from maskllm.megatron.loss import Losses, LossTerms


class _SquareHead(torch.autograd.Function):
    """The hidden states unchanged; their gradient also gets that of `weight` * ||hidden - target||^2 / ||target||^2."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, target: torch.Tensor, weight: float, split: dist.ProcessGroup | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        squares = squared_sums(hidden, target)
        if split is not None:
            dist.all_reduce(squares, group=split)
        ctx.save_for_backward(hidden, target, 2 * weight / squares[1])
        term = squares[0] / squares[1]
        ctx.mark_non_differentiable(term)
        return hidden.view_as(hidden), term

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor, None, None, None]:
        hidden, target, factor = ctx.saved_tensors
        return grad + (factor * (hidden.float() - target)).to(grad.dtype), None, None, None


class StudentAndTeacher(MegatronModule):
    """A model that learns from the hidden states and the predictions of a teacher.

    Args:
        student: the model that learns. It is called `module`, so that Megatron looks through this one.
        teacher: a frozen model of the same shape; None for the student's own weights without their masks.
        terms: how the terms of the loss of the output are weighted.
        squarehead: the weight of SquareHead: of the mean squared error of the hidden states after a layer, relative to the mean square of
            the teacher's, summed over the layers.
    """

    def __init__(self, student: MaskedGPTModel, teacher: MaskedGPTModel | None, terms: LossTerms, squarehead: float) -> None:
        super().__init__(config=student.config)
        self.module = student
        self._teacher = [teacher]  # in a list, so that it is no part of this module
        self.terms = terms
        self.squarehead = squarehead
        self.micro_batches = 1
        """How many micro-batches each data-parallel rank's loss is a mean over."""
        self.squarehead_terms: torch.Tensor | None = None
        """fp32 scalar. While it is set, each forward pass adds SquareHead's terms of this stage's layers."""
        self._input: torch.Tensor | None = None
        self._is_teacher = False
        if squarehead:
            for model in filter(None, (student, teacher)):
                for layer in model.modules():
                    if isinstance(layer, TransformerLayer):
                        layer.register_forward_hook(self._after_layer)

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None] | torch.Tensor | None) -> None:
        """Upstream's schedules hand over what `forward` has returned on the stage before."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor | Losses:
        """Run this pipeline stage, inside of an open draw.

        Args and result are those of `MaskedGPTModel.forward`, but the hidden states have twice the batch.
        """
        student, teacher = self.module, self._teacher[0] or self.module
        ours, theirs = (None, None) if self._input is None else self._input.chunk(2, dim=1)
        with torch.no_grad(), self._as_teacher():
            teacher.set_input_tensor(theirs)
            their_hidden = teacher.hidden_states(input_ids, position_ids)
        student.set_input_tensor(ours)
        hidden = student.hidden_states(input_ids, position_ids)
        if not student.post_process:
            return torch.cat([hidden, their_hidden], dim=1)
        with_teacher = (their_hidden, teacher.output_weight.detach()) if self.terms.kl else None
        return student.losses(hidden, labels, terms=self.terms, teacher=with_teacher)

    @contextlib.contextmanager
    def _as_teacher(self) -> Iterator[None]:
        self._is_teacher = True
        try:
            with without_masks():
                yield
        finally:
            self._is_teacher = False

    def _after_layer(self, layer: TransformerLayer, _inputs: Any, output: tuple) -> tuple | None:
        """Keep the teacher's hidden states after a layer for the micro-batch, and compare the student's with them."""
        hidden, *rest = output
        draw = current_draw()
        if self._is_teacher:
            draw.kept[layer.layer_number] = hidden
            return None
        split = layer.tp_group if self.config.sequence_parallel else None
        compared, term = _SquareHead.apply(hidden, draw.kept[layer.layer_number], self.squarehead / self.micro_batches, split)
        if self.squarehead_terms is not None and not draw.recomputing:
            self.squarehead_terms += term
        return (compared, *rest)
