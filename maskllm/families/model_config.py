"""A model's architecture, independent of how Hugging Face or Megatron spell it, and checks of what fits it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from maskllm.errors import MaskLLMError
from maskllm.families.rope import Rope


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Each layer has a norm, attention, a norm and an MLP. Sizes are in elements."""

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
    add_bias: bool
    """Whether every linear of a layer has a bias."""
    vocab_padding: int = field(default=0, kw_only=True)
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


def check_vocabulary(smallest_token: int, largest_token: int, vocab_size: int, source: str) -> None:
    """Raise MaskLLMError if the tokens that were found in `source` do not all lie in the model's vocabulary."""
    if smallest_token < 0:
        raise MaskLLMError(f"{source}: found token {smallest_token}, wanted 0 or more; the data is damaged, make it again")
    if largest_token >= vocab_size:
        raise MaskLLMError(
            f"{source}: found token {largest_token}, wanted less than the model's vocabulary of {vocab_size}; its tokenizer is "
            "another model's"
        )
