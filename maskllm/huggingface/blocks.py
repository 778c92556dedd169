"""The stacks of blocks of a transformers model, found by structure, and the matrices in them that are pruned."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from maskllm.errors import MaskLLMError

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""What transformers calls the linears that choose between the `experts` beside them."""


def block_stacks(model: PreTrainedModel) -> dict[str, torch.nn.ModuleList]:
    """The model's stacks of blocks by name, such as model.layers, or encoder.block and decoder.block.

    A stack is a list of modules that have parts of their own, with a matrix in them. A list inside of a block is part of the block.
    Raises MaskLLMError if the model has none.
    """
    stacks: dict[str, torch.nn.ModuleList] = {}
    for name, module in model.named_modules():
        outer = tuple(f"{stack}." for stack in stacks)
        if isinstance(module, torch.nn.ModuleList) and not (outer and name.startswith(outer)) and _is_stack(module):
            stacks[name] = module
    if not stacks:
        raise MaskLLMError(f"{type(model).__name__} has no stack of blocks: no list of modules with matrices in them")
    return stacks


def _is_stack(modules: torch.nn.ModuleList) -> bool:
    if not all(next(module.children(), None) is not None for module in modules):
        return False
    return any(tensor.dim() == 2 for tensor in itertools.chain(modules.parameters(), modules.buffers()))


def block_linears(model: PreTrainedModel) -> dict[str, torch.nn.Linear | Conv1D]:
    """The linears in the model's stacks of blocks by name, those of encoders and decoders too.

    Routers of experts are none of them, and neither are linears that share their weight with another module (Zamba's shared blocks): a
    mask would hold in one of them only. Raises MaskLLMError if the model has no stack of blocks.
    """
    linears = {name: linear for stack, blocks in block_stacks(model).items() for name, linear in linears_of(blocks, stack).items()}
    shared = shared_weights(model)
    return {name: linear for name, linear in linears.items() if not _is_router(model, name) and f"{name}.weight" not in shared}


def shared_weights(model: torch.nn.Module) -> dict[str, str]:
    """The parameters that are one and the same, by name: another name for each."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {name: next(other for other in same if other != name) for same in names.values() if len(same) > 1 for name in same}


def linears_of(block: torch.nn.Module, prefix: str) -> dict[str, torch.nn.Module]:
    """The linears in `block`, by their names in it with `prefix` in front."""
    return {f"{prefix}.{name}": module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}


def _is_router(model: torch.nn.Module, name: str) -> bool:
    """Whether the linear `name`, or a module that it is in, is a router: called so, and beside `experts`."""
    parts = name.split(".")
    return any(
        part in _ROUTERS and hasattr(model.get_submodule(".".join(parts[:depth])), "experts") for depth, part in enumerate(parts)
    )


def check_no_fused_experts(model: PreTrainedModel) -> None:
    """Raise MaskLLMError if a block has weights that are no linear's: those of several experts in one tensor.

    transformers 5 stores a mixture of experts so ("MoE": Mixtral, Qwen3-MoE). Its experts would stay dense.
    """
    for name, module in _modules_of_blocks(model):
        for key, weight in module.named_parameters(recurse=False):
            if weight.dim() == 3 and 1 not in weight.shape and not isinstance(module, torch.nn.Conv1d):
                raise MaskLLMError(
                    f"{type(model).__name__}: {name}.{key} is {list(weight.shape)}, the weights of {weight.shape[0]} experts; mixture of "
                    "experts is not supported, only linears [out, in]"
                )


def _modules_of_blocks(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    for stack, blocks in block_stacks(model).items():
        yield from blocks.named_modules(prefix=stack)


def matrix(linear: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear as a matrix [out, in], a view without gradient. `Conv1D` (GPT-2) stores it as [in, out]."""
    return as_matrix(linear, linear.weight.data)


def as_matrix(linear: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """`weight`, which has the layout of the linear's own weight, as a matrix [out, in]; a view."""
    return weight.t() if isinstance(linear, Conv1D) else weight
