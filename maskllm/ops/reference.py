"""The PyTorch reference of the kernels. It runs if no kernel was built, and the tests compare the kernels with it.

All arithmetic is in fp32 (fp64 for fp64 logits). The block's largest logit is subtracted before scaling. That does not change the
softmax, and large logits neither overflow nor lose the noise to rounding.
"""

from __future__ import annotations

import torch

from maskllm.ops.noise import NoiseKey, gumbel
from maskllm.patterns import Pattern, pack_mask


def _compute_dtype(mask_logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if mask_logits.dtype == torch.float64 else torch.float32


def probabilities(mask_logits: torch.Tensor, key: NoiseKey | None, scale: float, temperature: float) -> torch.Tensor:
    """`softmax((scale * l + g) / temperature)` over the last dimension; if `key` is None, `softmax(scale * l)`."""
    logits = mask_logits.to(_compute_dtype(mask_logits))
    scores = scale * (logits - logits.amax(-1, keepdim=True))
    if key is None:
        return torch.softmax(scores, -1)
    noise = gumbel(key, *logits.shape, dtype=logits.dtype, device=logits.device)
    return torch.softmax((scores + noise) * (1 / temperature), -1)


def first_argmax(values: torch.Tensor) -> torch.Tensor:
    """Index of the largest value in the last dimension, the lowest index of equal values (`torch.argmax` promises no order)."""
    index = torch.arange(values.shape[-1], device=values.device)
    best = torch.where(values == values.amax(-1, keepdim=True), index, values.shape[-1]).amin(-1)
    return best.clamp_(max=values.shape[-1] - 1)  # NaN equals nothing


def mask_of(probability: torch.Tensor, pattern: Pattern, hard: bool) -> torch.Tensor:
    """The mask `y @ S` [out, in / M, M]; if `hard`, the rows of `S` of the most probable candidates."""
    candidates = pattern.candidates(dtype=probability.dtype, device=probability.device)
    if hard:
        return candidates[first_argmax(probability)]
    return probability @ candidates


def forward(
    weight: torch.Tensor,
    mask_logits: torch.Tensor,
    pattern: Pattern,
    key: NoiseKey,
    scale: float,
    temperature: float,
    hard: bool,
    with_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The masked weight [out, in] in `weight`'s dtype, and the two sums for `stats`: fp32 [2], or empty without `with_stats`."""
    mask = mask_of(probabilities(mask_logits, key, scale, temperature), pattern, hard)
    masked = weight.to(mask.dtype).view_as(mask) * mask
    stats = weight.new_empty(0, dtype=torch.float32)
    if with_stats:
        certainty = probabilities(mask_logits, None, scale, 1.0).amax(-1)
        stats = torch.stack([masked.double().square().sum(), certainty.double().sum()]).float()
    return masked.to(weight.dtype).view_as(weight), stats


def backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    mask_logits: torch.Tensor,
    pattern: Pattern,
    key: NoiseKey,
    scale: float,
    temperature: float,
    weight_reg: float,
    hard: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the logits [out, in / M, C] and of the weight [out, in], both in the compute dtype.

    With y the probabilities, m the mask and `G = grad - 2 weight_reg W m`: dL/dW = G m and, with a = S (G W),
    dL/dl = scale / temperature * y (a - sum_c y_c a_c). A hard mask's gradient passes straight through to the soft mask.
    """
    probability = probabilities(mask_logits, key, scale, temperature)
    mask = mask_of(probability, pattern, hard)
    dense = weight.to(mask.dtype).view_as(mask)
    grad = grad.to(mask.dtype).view_as(mask) - 2 * weight_reg * dense * mask
    candidates = pattern.candidates(dtype=mask.dtype, device=mask.device)
    scores = (grad * dense) @ candidates.T
    expected = (probability * scores).sum(-1, keepdim=True)
    grad_logits = probability * (scores - expected) * (scale / temperature)
    return grad_logits, (grad * mask).view_as(weight)


def winner_bits(mask_logits: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask of each block's largest logit (the first of equal ones) as bits, uint8 [out, ceil(in / 8)]; logits [out, in / M, C]."""
    candidates = pattern.candidates(dtype=torch.bool, device=mask_logits.device)
    return pack_mask(candidates[first_argmax(mask_logits)].flatten(1))


def first_violation(matrix: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Flat index of the first block of [out, in] with more than N non-zeros, int64 []; -1 if there is none."""
    bad = ((matrix != 0).unflatten(1, (-1, pattern.m)).sum(-1) > pattern.n).flatten()
    index = torch.where(bad, torch.arange(bad.numel(), device=bad.device), bad.numel())
    first = index.min() if bad.numel() else index.sum()
    return torch.where(first < bad.numel(), first, -1)


def compress24(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and metadata of a 2:4 matrix (`maskllm.ops.compress24` describes them)."""
    blocks = matrix.unflatten(1, (-1, 4))
    # Order of the elements: non-zeros, then negative zeros, then positive zeros, each by position.
    negative_zero = (
        torch.signbit(blocks) & (blocks == 0) if matrix.is_floating_point() else torch.zeros_like(blocks, dtype=torch.bool)
    )
    rank = torch.where(blocks != 0, 0, torch.where(negative_zero, 4, 8)) + torch.arange(4, device=matrix.device)
    positions = rank.argsort(-1)[..., :2].sort(-1).values
    values = blocks.gather(-1, positions).flatten(1)
    halves = (positions[..., 0] | positions[..., 1] << 2).to(torch.uint8)
    halves = torch.nn.functional.pad(halves, (0, halves.shape[1] % 2)).unflatten(1, (-1, 2))
    return values, halves[..., 0] | halves[..., 1] << 4


def decompress24(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """The matrix of `compress24`'s values and metadata."""
    pairs = values.unflatten(1, (-1, 2))
    halves = torch.stack([metadata & 0xF, metadata >> 4], -1).flatten(1)[:, : pairs.shape[1]].long()
    positions = torch.stack([halves & 3, halves >> 2], -1)
    return values.new_zeros((*pairs.shape[:2], 4)).scatter_(-1, positions, pairs).flatten(1)
