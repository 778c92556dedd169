"""Megatron's GPT model with frozen embeddings and a frozen output layer. Mask learning runs this model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from maskllm.megatron.loss import frozen_linear_cross_entropy, softcap


class FrozenVocabularyGPTModel(GPTModel):
    """`GPTModel` that computes the loss in chunks of tokens if it gets labels, so the logits of all tokens never exist at once.

    The embeddings are frozen. With activation recomputation their output still requires a gradient, because Megatron's
    `checkpoint` runs the backward pass of a recomputed function only if one of its inputs requires a gradient.
    """

    def __init__(self, *args: Any, unpadded_vocab_size: int, **kwargs: Any) -> None:
        """`unpadded_vocab_size` is the number of tokens; `GPTModel`'s `vocab_size` also counts the rows of padding after them."""
        super().__init__(*args, **kwargs)
        self.unpadded_vocab_size = unpadded_vocab_size
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
    ) -> torch.Tensor:
        """Run this pipeline stage.

        Args:
            input_ids, position_ids: int64 [batch, sequence].
            attention_mask: None; attention is causal.
            labels: int64 [batch, sequence], or None for logits.

        Returns:
            On the last stage: fp32 losses [batch, sequence] if `labels` is given, otherwise logits [batch, sequence, vocabulary] of
            all tensor-parallel ranks, without the padding. On earlier stages: hidden states [sequence, batch, hidden size].
        """
        tp_group = self.pg_collection.tp
        if not self.post_process:
            return super().forward(input_ids, position_ids, attention_mask)
        if labels is None:
            logits = softcap(super().forward(input_ids, position_ids, attention_mask), self.config.logit_softcap)
            return gather_from_tensor_model_parallel_region(logits, group=tp_group)[..., : self.unpadded_vocab_size]
        # Without `post_process`, upstream's forward returns the decoder's output, which the loss below needs.
        self.post_process = False
        try:
            hidden = super().forward(input_ids, position_ids, attention_mask)
        finally:
            self.post_process = True
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=tp_group)
        losses = frozen_linear_cross_entropy(
            hidden.flatten(0, 1),
            weight,
            labels.t().flatten(),
            tp_group,
            self.unpadded_vocab_size,
            self.config.logit_softcap,
        )
        return losses.view(labels.shape[1], labels.shape[0]).t()


def _scale(embedding: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Scale the embeddings. Their dtype rounds the factor, as in transformers' Gemma models."""
    return output * torch.tensor(embedding.config.embedding_scale, dtype=output.dtype, device=output.device)


def _require_gradient(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
