"""The hidden states after each block of a model, and which of their tokens count."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from maskllm.errors import MaskLLMError
from maskllm.finetuning.labels import IGNORED
from maskllm.huggingface.blocks import block_stacks
from maskllm.masking.distillation import squarehead

States = dict[str, list[torch.Tensor]]
"""By a block's name its outputs [batch, tokens, hidden size] in a forward pass: one, or several if it is called again."""


class Blocks:
    """The blocks of a model's stacks, those of an encoder and those of a decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        stacks = block_stacks(model)
        self.modules = {f"{stack}.{index}": block for stack, blocks in stacks.items() for index, block in enumerate(blocks)}
        decoder = set(model.get_decoder().modules())
        is_both = model.config.is_encoder_decoder
        # The towers beside a language model have tokens of their own.
        self._reads_inputs = set(model.get_encoder().modules()) if is_both else decoder
        self._reads_labels = decoder - self._reads_inputs if is_both else set()

    @contextlib.contextmanager
    def recorded(self) -> Iterator[States]:
        """A block around a forward pass of the model, whose hidden states fill what it yields."""
        states: States = {}
        handles = [block.register_forward_hook(_keep(name, states)) for name, block in self.modules.items()]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def squarehead(self, ours: States, theirs: States, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The sum over the blocks of SquareHead's term (arXiv 2310.06927, section 3), an fp32 scalar.

        Padding is left out: what `attention_mask` leaves out, and in the decoder of an encoder-decoder model what
        `decoder_attention_mask` does or, without one, tokens without a label. A block that the student skipped has no term. Raises
        MaskLLMError if the teacher has no such block or another hidden size.
        """
        terms = []
        for name, states in ours.items():
            targets = theirs.get(name, [])
            for index, hidden in enumerate(states):
                found = list(targets[index].shape) if index < len(targets) else "no such states"
                if found != list(hidden.shape):
                    raise MaskLLMError(
                        f"teacher: after {name} it has {found}, the student {list(hidden.shape)}; wanted the same shape"
                    )
                terms.append(squarehead(hidden, targets[index], self._counted(name, inputs, hidden)))
        return torch.stack(terms).sum()

    def _counted(self, name: str, inputs: Mapping[str, Any], hidden: torch.Tensor) -> torch.Tensor | None:
        """Which tokens of `hidden` [batch, tokens, hidden size], a block's, are not padding, bool [batch, tokens]; None if all count."""
        mask = None
        if self.modules[name] in self._reads_inputs:
            mask = inputs.get("attention_mask")
        elif self.modules[name] in self._reads_labels:
            mask = inputs.get("decoder_attention_mask")
            if mask is None and (labels := inputs.get("labels")) is not None:
                mask = labels != IGNORED
        if mask is None or mask.dim() != 2 or hidden.dim() != 3 or len(mask) != len(hidden) or mask.shape[1] % hidden.shape[1]:
            return None
        # An audio encoder has one state for several frames of its input.
        return mask[:, :: mask.shape[1] // hidden.shape[1]].bool()


def _keep(name: str, states: States) -> Callable[..., None]:
    def hook(_block: torch.nn.Module, _inputs: Any, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

    return hook
