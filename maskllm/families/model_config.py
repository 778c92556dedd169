"""A model's architecture, independent of how Hugging Face or Megatron spell it, and checks of what fits it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from maskllm.errors import MaskLLMError
from maskllm.families.rope import Rope


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Each layer has a norm, attention, a norm and an MLP. Sizes are in elements.

    The fields with defaults are what only some families have.
    """

    model_type: str
    """The Hugging Face name of the family, a key of `registry.FAMILIES`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads (grouped-query attention); equal to `num_attention_heads` without grouping."""
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    normalization: str
    """RMSNorm or LayerNorm (which has a bias)."""
    zero_centered_norm: bool
    """Whether a norm multiplies by 1 + its weight ("LayerNorm1P")."""
    norm_epsilon: float
    activation: str
    """The activation of the MLP: silu, squared_relu or gelu_tanh."""
    gated_mlp: bool
    """Whether the MLP's activation multiplies a second projection (SwiGLU)."""
    rope: Rope | None
    """Rotary position embeddings; None if positions are learned and added to the word embeddings."""
    tie_word_embeddings: bool
    qkv_bias: bool
    """Whether the query, key and value projections have biases."""
    proj_bias: bool
    """Whether the attention's output projection has a bias."""
    mlp_bias: bool
    """Whether the MLP's linears have biases."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalized before they are rotated."""
    post_norms: bool = False
    """Whether the outputs of attention and MLP are normalized too, before they are added to the residual stream."""
    window: int | None = None
    """In layers with a window, a token attends to the last `window` tokens, itself included."""
    windowed_layers: tuple[bool, ...] = ()
    """For each layer whether it has the window; empty if no layer has one."""
    local_rope: Rope | None = None
    """The rotary embeddings of the layers with a window, if they differ from the others' (`rope`)."""
    attention_scale: float | None = None
    """The factor of the attention scores; None for head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Attention scores x become cap * tanh(x / cap)."""
    logit_softcap: float | None = None
    """Logits x become cap * tanh(x / cap)."""
    embedding_scale: float | None = None
    """The factor of the word embeddings at the input."""
    vocab_padding: int = 0
    """Rows of zeros after the vocabulary's in Megatron's embedding and output matrices, so that ranks can split them evenly."""

    def padded(self, multiple: int) -> ModelConfig:
        """This model with enough `vocab_padding`, and at least as much as before, for a multiple of `multiple` rows."""
        rows = self.vocab_size + self.vocab_padding
        return dataclasses.replace(self, vocab_padding=self.vocab_padding + -rows % multiple)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens: `max_position_embeddings`, or more if the scaling of rotary frequencies stretches it."""
        if self.rope is None or self.rope.scaling is None:
            return self.max_position_embeddings
        return self.rope.scaling.context(self.max_position_embeddings)

    def dimensions(self) -> dict[str, int]:
        """The sizes of tensors' dimensions, by the names that `linears` and the parameter maps use."""
        return {
            "vocab": self.vocab_size + self.vocab_padding,
            "head": self.head_dim,
            "positions": self.max_position_embeddings,
            "hidden": self.hidden_size,
            "ffn": self.ffn_hidden_size,
            "fc1": self.ffn_hidden_size * (2 if self.gated_mlp else 1),
            "heads": self.num_attention_heads * self.head_dim,
            "qkv": (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim,
        }

    def check_tensor_parallel(self, size: int) -> None:
        """Raise MaskLLMError if `size` tensor-parallel ranks cannot split this model's layers evenly."""
        for what, value in (
            ("number of attention heads", self.num_attention_heads),
            ("number of key-value heads", self.num_query_groups),
            ("MLP width", self.ffn_hidden_size),
        ):
            if value % size:
                raise MaskLLMError(
                    f"tensor-model-parallel size {size} does not divide the model's {what}, {value}; choose a size that does"
                )


def check_context(seq_length: int, context: int, option: str = "--seq-length") -> None:
    """Raise MaskLLMError if sequences of `seq_length` tokens, which `option` sets, are longer than the model's context."""
    if seq_length > context:
        raise MaskLLMError(f"{option} {seq_length}: the model has a context of {context} tokens; use at most that")


def check_vocabulary(tokens: np.ndarray | torch.Tensor, vocab_size: int, source: str) -> None:
    """Raise MaskLLMError if `tokens`, integers of any shape found in `source`, do not all lie in the model's vocabulary."""
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0:
        raise MaskLLMError(f"{source}: found token {smallest}, wanted 0 or more; the data is damaged, make it again")
    if largest >= vocab_size:
        raise MaskLLMError(
            f"{source}: found token {largest}, wanted less than the model's vocabulary of {vocab_size}; its tokenizer is "
            "another model's"
        )
