"""Frame 1: tensor-parallel linears whose weight passes through an N:M mask on its way to the matrix product.

Megatron Core's own `ColumnParallelLinear` and `RowParallelLinear` do the product, the communication and the weight's gradient. The
classes here hold a `MaskedParameter`, multiply by the weight that it gives, and shard its tensors in checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from maskllm.errors import MaskLLMError
from maskllm.families.linears import LINEARS
from maskllm.families.model_config import ModelConfig
from maskllm.masking.parameter import MaskedParameter
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.norm import LocalNorm
from maskllm.megatron.transformer_config import FamilyTransformerConfig


class _MaskedLinear:
    """What the column-parallel and the row-parallel masked linear share."""

    partition_dim: int
    """The weight's dimension that tensor-parallel ranks split."""
    masked: MaskedParameter
    """The weight with its mask; `hold_masked_parameters` sets it when the model is built."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.masked.weight_for_product() as masked:
            return super()._forward_impl(input, masked, *args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> ShardedStateDict:
        """Upstream's, with the mask's tensors sharded as the weight is.

        Upstream's MLP splits a gated fc1's `weight` and `bias` into gate and up rows, but it knows no other names. The same factory is
        applied here to the mask's tensors; without it a change of tensor-parallel size would mix gate and up rows.
        """
        axes = {"weight": self.partition_dim, "mask_logits": self.partition_dim, "mask_bits": self.partition_dim}
        if self.partition_dim == 0:
            axes |= {"bias": 0, "weight_scales": 0}
        sharded = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.masked.location.split_row is not None:
            for key in (f"{prefix}{name}" for name in ("mask_logits", "mask_bits", "weight_scales")):
                if key in sharded:
                    sharded[key] = apply_swiglu_sharded_factory(
                        sharded[key], sharded_offsets, metadata.get("singleton_local_shards", False)
                    )
        return sharded


class MaskedColumnParallelLinear(_MaskedLinear, ColumnParallelLinear):
    """`ColumnParallelLinear` (outputs split over tensor-parallel ranks) with a masked weight."""

    partition_dim = 0


class MaskedRowParallelLinear(_MaskedLinear, RowParallelLinear):
    """`RowParallelLinear` (inputs split over tensor-parallel ranks) with a masked weight.

    It also holds the norm of attention's and MLP's outputs (`ModelConfig.post_norms`), as `post_layernorm`.
    """

    partition_dim = 1

    def __init__(self, *args: Any, config: FamilyTransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.post_layernorm = LocalNorm(config, self.output_size, config.layernorm_epsilon) if config.post_norms else None

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Upstream's, with `post_layernorm`, and with a bias of its own to hand on (`skip_bias_add`).

        Upstream's recomputation of the MLP returns that bias from an autograd function, which turns the tensor in place into an output
        of that function. The parameter itself would stay one, and the next backward pass would go through it into the old function.
        """
        output, bias = super().forward(input_)
        if self.post_layernorm is not None:
            output = self.post_layernorm(output)
        return output, None if bias is None else bias.view_as(bias)


BY_PARTITION_DIM = {kind.partition_dim: kind for kind in (MaskedColumnParallelLinear, MaskedRowParallelLinear)}
"""The masked linears by the dimension that ranks split, as the inventory (`maskllm.families.linears`) states it."""


def hold_masked_parameters(model: torch.nn.Module, config: ModelConfig) -> None:
    """Give every masked linear of a freshly built model its `MaskedParameter`: its name in the whole model and the part held here.

    Megatron gives a bias to all linears if one besides the QKV projection has one. The others' biases are removed.
    """
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            for linear in LINEARS:
                owner = module.get_submodule(linear.name)
                location = linear.location(config, module.layer_number - 1, owner.tp_group.rank(), owner.tp_group.size())
                owner.masked = MaskedParameter(owner, location)
                # Upstream marks weights that it initializes. The norm of a gradient counts what is not marked once, not on every rank.
                set_tensor_model_parallel_attributes(owner.weight, True, linear.partition_dim, 1)
                if not linear.has_bias(config):
                    owner.bias = None


def masked_linears(model: torch.nn.Module) -> Iterator[MaskedColumnParallelLinear | MaskedRowParallelLinear]:
    """The model's masked linears in layer order."""
    return (module for module in model.modules() if isinstance(module, _MaskedLinear))


def masked_parameters(model: torch.nn.Module) -> list[MaskedParameter]:
    """The weights of the model's masked linears in layer order."""
    return [linear.masked for linear in masked_linears(model)]


def attach_bits(model: torch.nn.Module) -> None:
    """Make room for fixed masks in all masked linears; a checkpoint fills it.

    Raises MaskLLMError if the bits of a tensor-parallel shard's row do not fill whole bytes.
    """
    _check_whole_bytes(model)
    for linear in masked_linears(model):
        linear.masked.attach_bits()


def attach_scales(model: torch.nn.Module, sampler: MaskSampler) -> None:
    """Make room for masks by magnitude and for scales of 1 in all masked linears.

    Tensor-parallel ranks of a row-parallel linear all have the scales of all rows, and each adds the gradients of its own columns.
    Raises MaskLLMError if a shard's row does not split into whole blocks, or its bits do not fill whole bytes.
    """
    _check_whole_bytes(model)
    for linear in masked_linears(model):
        linear.masked.attach_scales(sampler)
        scales = linear.weight_scales
        if linear.partition_dim == 0:
            set_tensor_model_parallel_attributes(scales, True, 0, 1)
        elif linear.tp_group.size() > 1:
            scales.register_hook(functools.partial(_sum_over, linear.tp_group))


def _sum_over(group: dist.ProcessGroup, gradient: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(gradient, group=group)
    return gradient


def _check_whole_bytes(model: torch.nn.Module) -> None:
    """Raise MaskLLMError if the bits of a tensor-parallel shard's row do not fill whole bytes."""
    for linear in masked_linears(model):
        in_features = linear.weight.shape[1]
        if linear.partition_dim == 1 and linear.tp_group.size() > 1 and in_features % 8:
            raise MaskLLMError(
                f"{linear.masked.location.name}: a tensor-parallel shard has {in_features} input columns, not a multiple of 8, so its "
                "mask bits do not fill whole bytes; use a smaller --tensor-model-parallel-size"
            )


def attach_logits(model: torch.nn.Module, sampler: MaskSampler, *, dtype: torch.dtype = torch.float32) -> None:
    """Make room for learnable logits in all masked linears; `MaskedParameter.reset` or a checkpoint fills it."""
    for linear in masked_linears(model):
        linear.masked.attach_logits(sampler, dtype=dtype)
        set_tensor_model_parallel_attributes(linear.mask_logits, True, linear.partition_dim, 1)
        linear.mask_logits.allreduce = True
