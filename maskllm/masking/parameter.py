"""A linear's weight with its mask: fixed (bits), learnable (logits), or none. It knows no framework.

A frame (`maskllm.megatron.linears`, `maskllm.huggingface.masked_linear`) has a module for each linear. The module owns the tensors, so
that state dicts, `.to()` and optimizers see them, and holds a `MaskedParameter`, which does the method:

    weight        [out, in]
    mask_bits     uint8 [out, ceil(in / 8)], buffer: the fixed mask, or the prior of a learnable one (`maskllm.patterns.pack_mask`)
    mask_logits   fp32 or bf16 [out, in / M, candidates], parameter: one distribution over the candidate masks for each block
    weight_scales fp32 [out, 2], parameter: the factors of a dense weight that is trained toward its mask by magnitude (CAST)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from maskllm.masking.draw import current_draw, draw_is_open, masks_are_off
from maskllm.masking.prior import add_prior, initial_logits
from maskllm.masking.sampler import MaskSampler
from maskllm.masking.scaling import GROUPS, group_boundary, scaled
from maskllm.masking.selection import keep_of_each_block
from maskllm.ops import NoiseKey, ShardMap, masked_weight, philox_key, winner_bits, winner_bits_of_all
from maskllm.patterns import Pattern, pack_mask, unpack_mask


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or all of it if FSDP has sharded it over ranks, which all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Location:
    """Which weight of the unsharded model this is, and which of its rows and columns are here. Noise is a function of both.

    Local row r is global row `row_offset + r`, or `split_offset + (r - split_row)` from `split_row` on: a shard of a gated fc1 holds gate
    rows and then up rows. Local column c is global column `column_offset + c` of `columns`.
    """

    name: str
    """The linear's name in the unsharded model, for example decoder.layers.3.mlp.linear_fc1."""
    columns: int
    column_offset: int = 0
    row_offset: int = 0
    split_row: int | None = None
    split_offset: int = 0

    def shard_map(self, pattern: Pattern) -> ShardMap:
        """The same place counted in blocks of `pattern`."""
        return ShardMap(
            self.columns // pattern.m, self.column_offset // pattern.m, self.row_offset, self.split_row, self.split_offset
        )


class _View(NamedTuple):
    """How a tensor that autograd wants to keep, such as a transposed masked weight, lies in the masked weight's memory."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _FixedMask(torch.autograd.Function):
    """A trained weight that is zero wherever its fixed mask is: the weight itself, without a copy, and the mask for its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(bits)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (bits,) = ctx.saved_tensors
        return grad * unpack_mask(bits, grad.shape[1]), None


class MaskedParameter:
    """The weight of `owner` with its mask."""

    def __init__(self, owner: torch.nn.Module, location: Location, *, transposed: bool = False) -> None:
        """Take a module that has a `weight`; it starts dense. `transposed`: its weight is stored [in, out]."""
        self._owner = owner
        self.transposed = transposed
        self.location = location
        self.sampler: MaskSampler | None = None
        """The pattern and how masks are drawn from the logits; None while there are neither logits nor scales."""
        self._winner: torch.Tensor | None = None
        """The bits of the mask that `use_winners` has chosen; None outside of its block."""
        owner.register_buffer("mask_bits", None)
        owner.register_parameter("mask_logits", None)
        owner.register_parameter("weight_scales", None)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight [out, in], contiguous."""
        return self._own_weight.t().contiguous() if self.transposed else self._own_weight

    @property
    def _own_weight(self) -> torch.nn.Parameter:
        """The parameter as it is stored. The owner's attribute may be a stand-in for it (`maskllm.huggingface.masked_linear`)."""
        return self._owner._parameters["weight"]

    @property
    def bits(self) -> torch.Tensor | None:
        """The fixed or prior mask as bits, uint8 [out, ceil(in / 8)]."""
        return self._owner.mask_bits

    @property
    def logits(self) -> torch.nn.Parameter | None:
        """fp32 or bf16 [out, in / M, candidates]."""
        return self._owner.mask_logits

    @property
    def scales(self) -> torch.nn.Parameter | None:
        """fp32 [out, 2]: what the product multiplies the weights of each row by. A tensor-parallel rank has them for its rows."""
        return self._owner.weight_scales

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight here."""
        rows, columns = self._own_weight.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def attach_bits(self) -> None:
        """Make room for a fixed mask. A checkpoint fills it."""
        rows, columns = self.shape
        self._owner.mask_bits = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8, device=self._own_weight.device)

    def attach_logits(self, sampler: MaskSampler, *, dtype: torch.dtype = torch.float32) -> None:
        """Make room for learnable logits, all zero; `reset` or a checkpoint fills them.

        Raises MaskLLMError if a row does not split into whole blocks.
        """
        rows, columns = self.shape
        pattern = sampler.pattern
        pattern.check_divides(columns, self.location.name)
        logits = torch.zeros(rows, columns // pattern.m, pattern.num_candidates, dtype=dtype, device=self._own_weight.device)
        self._owner.mask_logits = torch.nn.Parameter(logits)
        self.sampler = sampler
        self.shard = self.location.shard_map(pattern)
        """Where the blocks here lie in the unsharded weight."""
        self._noise_key = philox_key(sampler.seed, self.location.name)

    def attach_scales(self, sampler: MaskSampler) -> None:
        """Make room for a mask by magnitude, as `bits`, and for scales of 1.

        Raises MaskLLMError if a row does not split into whole blocks.
        """
        rows, columns = self.shape
        sampler.pattern.check_divides(columns, self.location.name)
        self.attach_bits()
        self._owner.weight_scales = torch.nn.Parameter(torch.ones(rows, GROUPS, device=self._own_weight.device))
        self.sampler = sampler

    @torch.no_grad()
    def reset(self, prior_strength: float | None = None) -> None:
        """Draw the logits that learning starts from and, with a `prior_strength`, move them toward the mask in `bits`."""
        pattern = self.sampler.pattern
        logits = initial_logits(
            self.logits.shape[:2],
            pattern,
            seed=self.sampler.seed,
            layer_name=self.location.name,
            shard=self.shard,
            device=self.logits.device,
        )
        if prior_strength is not None:
            add_prior(logits, self.fixed_mask(), pattern, prior_strength)
        self.logits.copy_(logits)

    def fixed_mask(self) -> torch.Tensor:
        """The mask in `bits`, bool [out, in]."""
        return unpack_mask(self.bits, self.shape[1])

    def fix_winner(self) -> None:
        """Replace the logits by their arg-max mask."""
        self._owner.mask_bits, self._owner.mask_logits, self.sampler = self.winner_bits(), None, None

    @torch.no_grad()
    def write_zeros(self) -> None:
        """Set the weights that the fixed mask removes to zero; of a weight that FSDP has sharded, those of this rank."""
        weight, mask = self._own_weight, self.fixed_mask()
        if self.transposed:
            mask = mask.t()
        if isinstance(weight, DTensor):
            shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
            mask = mask[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))]
            weight = weight.to_local()
        weight.mul_(mask)

    @torch.no_grad()
    def winner_bits(self) -> torch.Tensor:
        """The mask that the training so far leads to, as `bits` holds masks: the arg-max mask of the logits, or that by magnitude.

        The mask by magnitude keeps the N largest |weight| of each block, of equals those with the lower index (CAST, equation 6).
        """
        if self.logits is not None:
            return winner_bits(whole(self.logits), self.sampler.pattern)
        return pack_mask(keep_of_each_block(self.weight.abs(), self.sampler.pattern))

    @property
    def is_learned_in_pass(self) -> bool:
        """Whether this is a forward pass whose products need a mask from the logits. The zeros of a fixed mask are in the weight.

        No product reads a weight that FSDP has sharded; FSDP itself does.
        """
        return (
            self.logits is not None and (draw_is_open() or self._winner is not None) and not isinstance(self._own_weight, DTensor)
        )

    def refresh_mask(self, bits: torch.Tensor) -> None:
        """Make `bits`, uint8 [out, ceil(in / 8)], the mask."""
        self._owner.mask_bits.copy_(bits)

    def effective_weight(self) -> torch.Tensor:
        """The weight that the matrix product uses, [out, in], in the weight's dtype.

        With logits it is the weight times a mask drawn in the open draw (`maskllm.masking.draw`), or times the winner inside of
        `use_winners`; with scales the dense weight times them, inside of `use_winners` also times the mask by magnitude; with bits alone
        the weight times the fixed mask; else, and inside of `without_masks`, the dense weight.
        """
        if masks_are_off():
            return self.weight
        if self.scales is not None:
            product = self._scaled_weight()
            return product if self._winner is None else product * unpack_mask(self._winner, self.shape[1])
        if self.logits is None:
            if self.bits is None:
                return self.weight
            return _FixedMask.apply(self.weight, self.bits) if self._own_weight.requires_grad else self.weight * self.fixed_mask()
        if self._winner is not None:
            return self.weight * unpack_mask(self._winner, self.shape[1])
        draw = current_draw()
        return self._masked_weight(draw.sample, None if draw.recomputing else self.sampler.stats)

    @contextlib.contextmanager
    def weight_for_product(self) -> Iterator[torch.Tensor]:
        """A block that multiplies by `effective_weight`.

        Autograd keeps that weight for the backward pass. With `MaskSampler.recompute_masked_weight` it keeps the sample index instead,
        and the backward pass draws the masked weight again; a scaled weight is multiplied again.
        """
        masked = self.effective_weight()
        if self.sampler is None or not masked.requires_grad or not self.sampler.recompute_masked_weight:
            yield masked
            return
        again: Callable[[], torch.Tensor] = self._scaled_weight
        if self.logits is not None:
            again = functools.partial(self._masked_weight, current_draw().sample, None)
        storage = masked.untyped_storage().data_ptr()

        def pack(tensor: torch.Tensor) -> torch.Tensor | _View:
            is_masked = tensor.untyped_storage().data_ptr() == storage
            return _View(tensor.shape, tensor.stride(), tensor.storage_offset()) if is_masked else tensor

        def unpack(kept: torch.Tensor | _View) -> torch.Tensor:
            if isinstance(kept, _View):
                return again().detach().as_strided(*kept)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield masked

    def _scaled_weight(self) -> torch.Tensor:
        """The dense weight times its scales."""
        boundary = group_boundary(self.location.columns, self.sampler.pattern.m) - self.location.column_offset
        return scaled(self.weight, self.scales, min(max(boundary, 0), self.shape[1]))

    def _masked_weight(self, sample: int, stats: torch.Tensor | None) -> torch.Tensor:
        """The weight times the mask of the global sample index `sample`; `stats` as `maskllm.ops.masked_weight` has it."""
        sampler = self.sampler
        return masked_weight(
            self.weight,
            self.logits,
            pattern=sampler.pattern,
            key=NoiseKey(self._noise_key, sample, self.shard),
            scale=sampler.scale,
            temperature=sampler.temperature,
            weight_reg=sampler.weight_reg,
            hard=sampler.hard,
            stats=stats,
        )


@contextlib.contextmanager
def use_winners(parameters: Sequence[MaskedParameter]) -> Iterator[None]:
    """A block in which each of `parameters` that has logits or scales multiplies by its winner, as after training.

    The winners are the arg-max masks of the logits, or the masks by magnitude, when the block begins. They are found once, and kept as
    one bit a weight. The parameters share a pattern and a device. Raises MaskLLMError if a logit is NaN.
    """
    learned = [parameter for parameter in parameters if parameter.logits is not None]
    if learned:
        winners = winner_bits_of_all([whole(parameter.logits) for parameter in learned], learned[0].sampler.pattern)
        for parameter, bits in zip(learned, winners, strict=True):
            parameter._winner = bits
    for parameter in parameters:
        if parameter.scales is not None:
            parameter._winner = parameter.winner_bits()
    try:
        yield
    finally:
        for parameter in parameters:
            parameter._winner = None
