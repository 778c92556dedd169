"""Frame 2: masked linears in any transformers model, on plain torch modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from maskllm.huggingface.blocks import check_no_fused_experts, linears_of, transformer_blocks
from maskllm.masking.parameter import Location, MaskedParameter
from maskllm.masking.sampler import MaskSampler


class MaskedLinear(torch.nn.Module):
    """Replaces a `torch.nn.Linear` or a `Conv1D` (GPT-2) and takes over its `weight` and `bias` parameters."""

    def __init__(self, linear: torch.nn.Linear | Conv1D, location: Location) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.masked = MaskedParameter(self, location, transposed=isinstance(linear, Conv1D))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply `input` [..., in] by the masked weight and add the bias; returns [..., out]."""
        with self.masked.weight_for_product() as weight:
            return F.linear(input, weight, self.bias)


def mask_linears(
    model: PreTrainedModel, sampler: MaskSampler, locations: Mapping[str, Location] | None = None
) -> dict[str, MaskedParameter]:
    """Freeze `model` and replace every linear of its transformer blocks by a masked linear with learnable logits.

    Args:
        sampler: how masks are drawn, in the draw that is open (`maskllm.masking.draw`).
        locations: by the linear's name, which part of which weight it is. This determines its noise. A linear that is
            not listed is a whole weight with its own name. With the locations of Megatron's fused weights, both frames draw alike.

    Returns the masked weights by the linears' names. Their logits are zero; `MaskedParameter.reset` draws the initial logits.
    Raises MaskLLMError if the model has no transformer blocks or is a mixture of experts, or if the pattern does not fit a weight.
    """
    prefix, blocks = transformer_blocks(model)
    check_no_fused_experts(model)
    model.requires_grad_(False)
    found = {}
    for name, linear in linears_of(blocks, prefix).items():
        columns = linear.weight.shape[0 if isinstance(linear, Conv1D) else 1]
        masked = MaskedLinear(linear, (locations or {}).get(name, Location(name, columns)))
        masked.masked.attach_logits(sampler)
        model.set_submodule(name, masked)
        found[name] = masked.masked
    return found
