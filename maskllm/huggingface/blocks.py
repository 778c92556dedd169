"""The transformer blocks of a transformers model, and the matrices in them that are pruned."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from maskllm.errors import MaskLLMError

_BLOCK_LISTS = ("layers", "h")
"""Names of the list of blocks: `layers` in LLaMA and most other families, `h` in GPT-2."""


def transformer_blocks(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The name of the model's list of transformer blocks, such as model.layers, and the list.

    Raises MaskLLMError if the model has no such list.
    """
    for name in _BLOCK_LISTS:
        blocks = getattr(model.base_model, name, None)
        if isinstance(blocks, torch.nn.ModuleList) and len(blocks):
            return f"{model.base_model_prefix}.{name}", blocks
    places = " or ".join(f"{model.base_model_prefix}.{name}" for name in _BLOCK_LISTS)
    raise MaskLLMError(f"{type(model).__name__} has no list of transformer blocks at {places}")


def linears_of(block: torch.nn.Module, prefix: str) -> dict[str, torch.nn.Module]:
    """The linears in `block`, by their names in it with `prefix` in front."""
    return {f"{prefix}.{name}": module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}


def check_no_fused_experts(model: PreTrainedModel) -> None:
    """Raise MaskLLMError if a transformer block has weights that are no linear's: those of several experts in one tensor.

    transformers 5 stores a mixture of experts so ("MoE": Mixtral, Qwen3-MoE). Its experts would stay dense.
    """
    prefix, blocks = transformer_blocks(model)
    for name, module in blocks.named_modules(prefix=prefix):
        for key, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and 1 not in weight.shape and not isinstance(module, torch.nn.Conv1d):
                raise MaskLLMError(
                    f"{type(model).__name__}: {name}.{key} is {list(weight.shape)}, the weights of {weight.shape[0]} experts; mixture of "
                    "experts is not supported, only linears [out, in]"
                )


def matrix(linear: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear as a matrix [out, in], a view without gradient. `Conv1D` (GPT-2) stores it as [in, out]."""
    return as_matrix(linear, linear.weight.data)


def as_matrix(linear: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """`weight`, which has the layout of the linear's own weight, as a matrix [out, in]; a view."""
    return weight.t() if isinstance(linear, Conv1D) else weight


def linears_in_lists(model: torch.nn.Module) -> dict[str, torch.nn.Linear | Conv1D]:
    """The linears in lists of modules, by name: those of all blocks, whatever a model calls them, of encoders and decoders too."""
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name.startswith(tuple(lists))
    }
