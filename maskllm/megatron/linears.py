"""Tensor-parallel linears whose weight passes through an N:M mask on its way to the matrix product.

Megatron Core's own `ColumnParallelLinear` and `RowParallelLinear` do the product, the communication and the weight's gradient; the
classes here only replace the weight they use. A layer starts dense. `attach_bits` gives it a fixed mask, `attach_logits` a learnable one.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from maskllm.errors import MaskLLMError
from maskllm.masking.draw import current_sample, is_recomputing
from maskllm.masking.prior import add_prior, initial_logits
from maskllm.masking.sampler import MaskMode, MaskSampler
from maskllm.ops import NoiseKey, ShardMap, masked_weight, philox_key, winner_bits, winner_mask
from maskllm.patterns import Pattern, unpack_mask


class _MaskedLinear:
    """What the column-parallel and the row-parallel masked linear share."""

    partition_dim: int
    """The weight's dimension that tensor-parallel ranks share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = ""
        """The layer's name in the whole model, for example decoder.layers.3.mlp.linear_fc1; `spec.masked_linears` sets it."""
        self.gated = False
        """Whether the rows are a gate slice followed by an up slice (fc1 of a gated MLP); `spec.masked_linears` sets it."""
        self.register_buffer("mask_bits", None)
        """uint8 [out, ceil(in / 8)], the fixed or prior mask as `patterns.pack_mask` has it."""
        self.register_parameter("mask_logits", None)
        """fp32 or bf16 [out, in / M, candidates]."""

    def attach_bits(self) -> None:
        """Give the layer room for a fixed mask; its contents come from a checkpoint.

        Raises MaskLLMError where a tensor-parallel shard's rows do not fill whole bytes.
        """
        out_features, in_features = self.weight.shape
        if self.partition_dim == 1 and self.tp_group.size() > 1 and in_features % 8:
            raise MaskLLMError(
                f"{self.name}: a tensor-parallel shard has {in_features} input columns, not a multiple of 8, so its mask bits do "
                "not fill whole bytes; use a smaller --tensor-model-parallel-size"
            )
        self.mask_bits = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=self.weight.device)

    def attach_logits(
        self, sampler: MaskSampler, *, draw: bool, prior_strength: float | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Give the layer learnable logits of type `dtype`, fp32 or bf16.

        They are drawn as `initial_logits` says and, with a `prior_strength`, moved toward the mask in `mask_bits` or, where a
        checkpoint's will replace them, zeros.
        """
        out_features, in_features = self.weight.shape
        pattern = sampler.pattern
        pattern.check_divides(in_features, self.name)
        self.shard = self._shard_map(pattern)
        self._philox_key = philox_key(sampler.seed, self.name)
        self.sampler = sampler
        shape = (out_features, in_features // pattern.m)
        device = self.weight.device
        if draw:
            logits = initial_logits(shape, pattern, seed=sampler.seed, layer_name=self.name, shard=self.shard, device=device)
            if prior_strength is not None:
                add_prior(logits, self.fixed_mask(), pattern, prior_strength)
        else:
            logits = torch.zeros(*shape, pattern.num_candidates, device=device, dtype=dtype)
        self.mask_logits = torch.nn.Parameter(logits.to(dtype))
        set_tensor_model_parallel_attributes(self.mask_logits, True, self.partition_dim, 1)
        self.mask_logits.allreduce = True

    def fixed_mask(self) -> torch.Tensor:
        """The mask in `mask_bits`, bool [out, in]."""
        return unpack_mask(self.mask_bits, self.weight.shape[1])

    def winner(self) -> torch.Tensor:
        """The arg-max mask of the logits, bool [out, in]."""
        return winner_mask(self.mask_logits, self.sampler.pattern)

    def winner_bits(self) -> torch.Tensor:
        """The arg-max mask of the logits as `mask_bits` holds masks."""
        return winner_bits(self.mask_logits, self.sampler.pattern)

    def effective_weight(self) -> torch.Tensor:
        """The weight that the matrix product uses, [out, in], in the weight's dtype."""
        if self.mask_logits is None:
            return self.weight if self.mask_bits is None else self.weight * self.fixed_mask()
        if self.sampler.mode is MaskMode.WINNER:
            return self.weight * self.winner()
        return self._draw(current_sample(), None if is_recomputing() else self.sampler.stats)

    def _draw(self, sample: int, stats: torch.Tensor | None) -> torch.Tensor:
        """The weight times the mask drawn for the global sample index `sample`; `stats` as `masked_weight` has it."""
        sampler = self.sampler
        return masked_weight(
            self.weight,
            self.mask_logits,
            pattern=sampler.pattern,
            key=NoiseKey(self._philox_key, sample, self.shard),
            scale=sampler.scale,
            temperature=sampler.temperature,
            weight_reg=sampler.weight_reg,
            hard=sampler.hard,
            stats=stats,
        )

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        masked = self.effective_weight()
        if not masked.requires_grad or not self.sampler.recompute_masked_weight:
            return super()._forward_impl(input, masked, *args, **kwargs)
        # Upstream's linear keeps the weight it was given for the backward pass: here a second copy of the frozen weights. Keep the
        # draw's index instead.
        sample, storage = current_sample(), masked.data_ptr()

        def pack(tensor: torch.Tensor) -> torch.Tensor | None:
            return None if tensor.data_ptr() == storage else tensor

        def unpack(kept: torch.Tensor | None) -> torch.Tensor:
            return self._draw(sample, None).detach() if kept is None else kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return super()._forward_impl(input, masked, *args, **kwargs)

    def _shard_map(self, pattern: Pattern) -> ShardMap:
        """Where this rank's rows and blocks lie in the unsharded weight."""
        rank = self.tp_group.rank()
        rows, columns = self.weight.shape
        blocks_per_row = self.input_size // pattern.m
        if self.partition_dim == 1:
            return ShardMap(blocks_per_row, block_offset=rank * (columns // pattern.m))
        if self.gated:
            half = rows // 2
            return ShardMap(
                blocks_per_row, row_offset=rank * half, split_row=half, split_offset=self.output_size // 2 + rank * half
            )
        return ShardMap(blocks_per_row, row_offset=rank * rows)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> ShardedStateDict:
        """Upstream's, with the mask's tensors sharded as the weight is.

        Upstream's MLP splits a gated fc1's `weight` and `bias` into gate and up rows but knows no other name, so the same factory is
        applied here to the mask's tensors; without it a change of tensor-parallel size would mix gate and up rows.
        """
        axes = {"weight": self.partition_dim, "mask_logits": self.partition_dim, "mask_bits": self.partition_dim}
        if self.partition_dim == 0:
            axes["bias"] = 0
        sharded = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            axes,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.gated:
            for key in (f"{prefix}mask_logits", f"{prefix}mask_bits"):
                if key in sharded:
                    sharded[key] = apply_swiglu_sharded_factory(
                        sharded[key], sharded_offsets, metadata.get("singleton_local_shards", False)
                    )
        return sharded


class MaskedColumnParallelLinear(_MaskedLinear, ColumnParallelLinear):
    """`ColumnParallelLinear` (outputs split over tensor-parallel ranks) with a masked weight."""

    partition_dim = 0


class MaskedRowParallelLinear(_MaskedLinear, RowParallelLinear):
    """`RowParallelLinear` (inputs split over tensor-parallel ranks) with a masked weight."""

    partition_dim = 1

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Upstream's, with a bias that it hands on (`skip_bias_add`) as a tensor of its own.

        Upstream's recomputation of the MLP returns that bias from an autograd function, which makes it a result of that function in
        place. A frozen parameter would stay one, and the next backward pass would lead through it back to the function itself.
        """
        output, bias = super().forward(input_)
        return output, None if bias is None else bias.detach()
