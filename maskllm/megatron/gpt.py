"""Megatron's GPT model with a loss that never holds the logits of all tokens. Training runs this model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from maskllm.megatron.loss import CROSS_ENTROPY, Losses, LossTerms, linear_losses, softcap


class MaskedGPTModel(GPTModel):
    """`GPTModel` that computes the losses in chunks of tokens if it gets labels, so the logits of all tokens never exist at once.

    If the embeddings are frozen and activations are recomputed, the embeddings' output still requires a gradient, because Megatron's
    `checkpoint` runs the backward pass of a recomputed function only if one of its inputs requires a gradient.
    """

    def __init__(self, *args: Any, unpadded_vocab_size: int, **kwargs: Any) -> None:
        """`unpadded_vocab_size` is the number of tokens; `GPTModel`'s `vocab_size` also counts the rows of padding after them."""
        super().__init__(*args, **kwargs)
        self.unpadded_vocab_size = unpadded_vocab_size
        for name, parameter in self.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        if self.pre_process and self.config.embedding_scale is not None:
            self.embedding.register_forward_hook(_scale)
        if self.pre_process and self.config.recompute_granularity is not None:
            self.embedding.register_forward_hook(_require_gradient)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor | Losses:
        """Run this pipeline stage.

        Args:
            input_ids, position_ids: int64 [batch, sequence].
            attention_mask: None; attention is causal.
            labels: int64 [batch, sequence], or None for logits.

        Returns:
            On the last stage: the losses if `labels` is given, otherwise logits [batch, sequence, vocabulary] of all tensor-parallel
            ranks, without the padding. On earlier stages: hidden states [sequence, batch, hidden size].
        """
        if self.post_process and labels is None:
            logits = softcap(super().forward(input_ids, position_ids, attention_mask), self.config.logit_softcap)
            return gather_from_tensor_model_parallel_region(logits, group=self.pg_collection.tp)[..., : self.unpadded_vocab_size]
        hidden = self.hidden_states(input_ids, position_ids)
        return self.losses(hidden, labels) if self.post_process else hidden

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The output of this stage's last layer, and on the last stage of the final norm: [sequence, batch, hidden size]."""
        # Without `post_process`, upstream's forward returns the decoder's output.
        post_process, self.post_process = self.post_process, False
        try:
            return super().forward(input_ids, position_ids, None)
        finally:
            self.post_process = post_process

    def losses(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        *,
        terms: LossTerms = CROSS_ENTROPY,
        teacher: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Losses:
        """The losses of `hidden_states`' result on the last stage.

        Args:
            hidden: [sequence, batch, hidden size], of this rank's part of the sequence with sequence parallelism.
            labels: int64 [batch, sequence].
            terms: how the terms are weighted.
            teacher: the teacher's hidden states, of the same shape, and its `output_weight`.
        """
        tp_group = self.pg_collection.tp
        whole = gather_from_sequence_parallel_region if self.config.sequence_parallel else copy_to_tensor_model_parallel_region
        hidden = whole(hidden, group=tp_group).flatten(0, 1)
        if teacher is not None:
            states, weight = teacher
            teacher = (whole(states, group=tp_group).flatten(0, 1), weight)
        mean, *of_tokens = linear_losses(
            hidden,
            self.output_weight,
            labels.t().flatten(),
            tp_group,
            self.unpadded_vocab_size,
            self.config.logit_softcap,
            terms=terms,
            teacher=teacher,
        )
        return Losses(mean, *(losses.view(labels.shape[1], labels.shape[0]).t() for losses in of_tokens))

    @property
    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the output matrix, [(vocabulary + padding) / tensor-parallel ranks, hidden size], on the last stage."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight


def _scale(embedding: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Scale the embeddings. Their dtype rounds the factor, as in transformers' Gemma models."""
    return output * torch.tensor(embedding.config.embedding_scale, dtype=output.dtype, device=output.device)


def _require_gradient(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
