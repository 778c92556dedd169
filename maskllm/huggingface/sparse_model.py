"""Masks in any transformers model: `sparsify` puts them in, a training moves them or the weights under them, `finish` takes them out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from maskllm.errors import MaskLLMError
from maskllm.huggingface.blocks import as_matrix, block_linears, check_no_fused_experts, matrix, shared_weights
from maskllm.huggingface.mask_file import MaskFile, open_mask_file
from maskllm.huggingface.masked_linear import MaskedLinear
from maskllm.masking.parameter import Location, MaskedParameter
from maskllm.masking.sampler import MaskSampler
from maskllm.masking.selection import check_keeps, keep_of_each_block
from maskllm.patterns import Pattern, pack_mask

TRAINED = ("masks", "weights", "both")
"""What a training of a sparse model can change."""

Linears = dict[str, torch.nn.Linear | Conv1D]


def sparsify(
    model: PreTrainedModel,
    pattern: Pattern | str | None,
    *,
    train: str = "masks",
    masks: Mapping[str, torch.Tensor] | MaskFile | str | os.PathLike | None = None,
    modules: Iterable[str] | None = None,
    prior_strength: float = 3.0,
    seed: int = 1234,
    locations: Mapping[str, Location] | None = None,
) -> dict[str, MaskedParameter]:
    """Put a mask into every linear of the model's stacks of blocks, in place.

    Args:
        model: any model of transformers, not compressed or quantized.
        pattern: N:M, or None for unstructured sparsity, which is the masks'.
        train: what is to be trained. "masks": logits over the candidate masks, with all else frozen (MaskLLM, arXiv 2409.17481).
            "weights": the weights that a fixed mask keeps (sparse fine-tuning, arXiv 2310.06927), and all else that requires a gradient;
            zeros are written at once. "both": logits, and all that requires a gradient.
        masks: bool tensors by the name of the parameter (model.layers.0.mlp.up_proj.weight), in the parameter's own shape, or a mask
            file. With "weights" they are the masks; None for the zeros of the weights themselves. Else they are the prior; None for none.
        modules: which linears instead: names, or ends of names such as q_proj or lm_head.
        prior_strength: how far the prior moves the initial logits, in their standard deviations.
        seed: of the initial logits and of the masks that are drawn.
        locations: by the linear's name, which part of which weight it is; this determines its noise. A linear that is not listed is a whole
            weight with its own name. With the locations of Megatron's fused weights, both frames draw alike.

    Returns the masked weights by the linears' names.

    Raises MaskLLMError if the model has no stack of blocks, is a mixture of experts or already has masks; if `modules` name no linear; if
    the pattern does not fit a weight or has too many candidates to learn; if masks are missing or do not fit; or if weights that are to
    be trained are not fp32, or all frozen.
    """
    if train not in TRAINED:
        raise MaskLLMError(f"train {train!r}: wanted one of {', '.join(TRAINED)}")
    if isinstance(pattern, str):
        pattern = Pattern.parse(pattern)
    elif not isinstance(pattern, Pattern | None):
        raise MaskLLMError(f"pattern {pattern!r}: wanted N:M, or None for unstructured masks, which `masks` gives")
    linears = linears_to_mask(model, pattern, train=train, modules=modules)
    if masks is not None:
        chosen = given_masks(masks, linears, pattern)
    else:
        chosen = _own_zeros(linears, pattern) if train == "weights" else None

    if train == "masks":
        model._trainable_before_masks = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.requires_grad_(False)
    sampler = None if train == "weights" else MaskSampler(pattern, seed=seed)
    found = {}
    for name, linear in linears.items():
        location = (locations or {}).get(name, Location(name, matrix(linear).shape[1]))
        module = MaskedLinear(linear, location)
        parameter = found[name] = module.masked
        if chosen is not None:
            parameter.attach_bits()
            parameter.bits.copy_(pack_mask(as_matrix(linear, chosen.pop(name))))
        if sampler is None:
            parameter.write_zeros()
        else:
            parameter.attach_logits(sampler)
            parameter.reset(prior_strength=None if parameter.bits is None else prior_strength)
        model.set_submodule(name, module)
    return found


def linears_to_mask(
    model: PreTrainedModel, pattern: Pattern | None, *, train: str, modules: Iterable[str] | None = None
) -> Linears:
    """The linears that `sparsify` puts masks into, by name. Raises MaskLLMError as it does for all but the masks."""
    if train != "weights":
        _check_learnable(pattern, train)
    if any(isinstance(module, MaskedLinear) for module in model.modules()):
        raise MaskLLMError(f"{type(model).__name__}: has masks already; call finish first")
    linears = _all_linears(model) if modules is None else _named_linears(model, modules)
    for name, linear in linears.items():
        _check_linear(name, linear, pattern, train)
    if train != "masks" and not any(linear.weight.requires_grad for linear in linears.values()):
        raise MaskLLMError(f"train {train!r}: all weights that get masks are frozen; call model.requires_grad_(True) first")
    return linears


def masked_parameters(model: torch.nn.Module) -> dict[str, MaskedParameter]:
    """The masked weights of a model by the names of their linears, in the model's order."""
    return {name: module.masked for name, module in model.named_modules() if isinstance(module, MaskedLinear)}


def finish(model: PreTrainedModel) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Keep the winner of each block, or the fixed mask, write the zeros and put the original modules back, in place.

    What `sparsify` has frozen to learn masks alone requires a gradient again.

    Returns the model, whose state dict is that of the plain model, and the masks: bool by the name of the parameter, in its shape, on its
    device. `maskllm.huggingface.mask_file.write_mask_file` writes them. Raises MaskLLMError if the model has no masks or a logit is NaN.
    """
    masks = {}
    for name, parameter in masked_parameters(model).items():
        if parameter.logits is not None:
            parameter.fix_winner()
        parameter.write_zeros()
        linear = model.get_submodule(name).to_plain()
        masks[f"{name}.weight"] = as_matrix(linear, parameter.fixed_mask())
        model.set_submodule(name, linear)
    if not masks:
        raise MaskLLMError(f"{type(model).__name__}: has no masks; call sparsify first")
    trainable = vars(model).pop("_trainable_before_masks", ())
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)
    return model, masks


def _check_learnable(pattern: Pattern | None, train: str) -> None:
    instead = 'take train="weights" with masks from pruning'
    if pattern is None:
        raise MaskLLMError(f'train "{train}" without a pattern: unstructured masks cannot be learned; {instead}')
    try:
        pattern.require_learnable()
    except MaskLLMError as error:
        raise MaskLLMError(f"{error}; {instead}") from None


def _all_linears(model: PreTrainedModel) -> Linears:
    check_no_fused_experts(model)
    linears = block_linears(model)
    if not linears:
        raise MaskLLMError(
            f"{type(model).__name__}: its blocks have no linears with weights of their own; name the ones to sparsify as `modules`"
        )
    return linears


def _named_linears(model: PreTrainedModel, modules: Iterable[str]) -> Linears:
    found: Linears = {}
    modules = list(modules) if not isinstance(modules, str) else []
    if not modules:
        raise MaskLLMError("modules: wanted a list of names, such as ['q_proj', 'v_proj']; None for all linears of the blocks")
    shared = shared_weights(model)
    for wanted in modules:
        named = [(name, module) for name, module in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not named:
            raise MaskLLMError(f"modules: {type(model).__name__} has no module {wanted}")
        for name, module in named:
            if not isinstance(module, torch.nn.Linear | Conv1D):
                raise MaskLLMError(f"modules: {name} is a {type(module).__name__}; wanted a linear")
            if (other := shared.get(f"{name}.weight")) is not None:
                raise MaskLLMError(
                    f"modules: {name} shares its weight with {other.rpartition('.')[0]}, in which a mask would not hold; leave it out, or "
                    "untie the two first"
                )
            found[name] = module
    return found


def _check_linear(name: str, linear: torch.nn.Linear | Conv1D, pattern: Pattern | None, train: str) -> None:
    """Raise MaskLLMError if the linear cannot have a mask of this pattern that is trained so."""
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        raise MaskLLMError(
            f"{name}: torch.nn.MultiheadAttention multiplies by its weight without calling it, so no mask can be put into it; name the "
            "other linears as `modules`"
        )
    weight = linear.weight
    if weight.dim() != 2 or not weight.is_floating_point():
        raise MaskLLMError(f"{name}: its weight is {weight.dtype} {list(weight.shape)}; wanted floating-point numbers [out, in]")
    if pattern is not None:
        pattern.check_divides(matrix(linear).shape[1], name)
    if train != "masks" and weight.dtype != torch.float32:
        raise MaskLLMError(
            f"{name}: its weight is {weight.dtype}, in which small steps vanish; load the model with dtype=torch.float32 to train its "
            "weights (bf16=True in the training arguments computes in bf16)"
        )


def _own_zeros(linears: Linears, pattern: Pattern | None) -> dict[str, torch.Tensor]:
    """The masks that the weights' zeros are, in the weights' shapes. A block with more zeros than the pattern's keeps the first of them."""
    masks = {name: linear.weight.data != 0 for name, linear in linears.items()}
    if all(bool(mask.all()) for mask in masks.values()):
        raise MaskLLMError('train "weights": no weight is zero; prune the model first (maskllm.pruning.prune_hf), or give `masks`')
    if pattern is None:
        return masks
    for name, linear in linears.items():
        nonzero = as_matrix(linear, masks[name])
        kept = keep_of_each_block(nonzero.float(), pattern)
        if bool((nonzero & ~kept).any()):
            row, column = (nonzero & ~kept).nonzero()[0].tolist()
            block = column // pattern.m
            found = int(nonzero[row, block * pattern.m : (block + 1) * pattern.m].sum())
            raise MaskLLMError(
                f"{name}.weight: output {row}, block {block} has {found} weights that are not zero; pattern {pattern} wants "
                f"{pattern.n}. Prune the model with that pattern first, or give `masks`"
            )
        masks[name] = as_matrix(linear, kept)
    return masks


def given_masks(
    masks: Mapping[str, torch.Tensor] | MaskFile | str | os.PathLike, linears: Linears, pattern: Pattern | None
) -> dict[str, torch.Tensor]:
    """`masks`, as `sparsify` takes them, by the linears' names, bool in the weights' shapes and on their devices.

    Raises MaskLLMError if one is missing, unknown, of another shape, or does not keep N of M.
    """
    shapes = {f"{name}.weight": tuple(linear.weight.shape) for name, linear in linears.items()}
    if isinstance(masks, str | os.PathLike):
        masks = open_mask_file(masks)
    if isinstance(masks, MaskFile):
        masks.check(shapes)
        where, by_name = f"{masks.path}: ", {name: masks.mask(name, shape) for name, shape in shapes.items()}
    else:
        _check_masks(masks, shapes)
        where, by_name = "masks: ", masks
    chosen = {}
    for name, linear in linears.items():
        mask = chosen[name] = by_name[f"{name}.weight"].to(linear.weight.device)
        if pattern is not None:
            check_keeps(as_matrix(linear, mask), pattern, f"{where}{name}.weight")
    return chosen


def _check_masks(masks: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise MaskLLMError naming a parameter without a mask, a mask without one, or a mask of another dtype or shape."""
    for what, names in (("no mask for", shapes.keys() - masks.keys()), ("a mask for unknown", masks.keys() - shapes.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise MaskLLMError(f"masks: {what} {min(names)}{more}; wanted one for the weight of each linear that gets a mask")
    for name, shape in shapes.items():
        if masks[name].dtype != torch.bool or tuple(masks[name].shape) != shape:
            raise MaskLLMError(
                f"masks: that of {name} is {masks[name].dtype} {list(masks[name].shape)}; wanted torch.bool {list(shape)}"
            )
