"""How far a gradient of the mask logits is from the right one, measured against what cancels in it."""

import torch

from maskllm.ops import NoiseKey, reference
from maskllm.patterns import Pattern

TOLERANCE = 1e-5
"""For fp32 results. A score has an error of two or three units in the last place (2e-6 if it is near 30), and the temperature (0.7 in
the tests) divides it before it becomes a relative error of a probability."""


def logits_gradient_error(
    found: torch.Tensor,
    grad: torch.Tensor,
    weight: torch.Tensor,
    mask_logits: torch.Tensor,
    pattern: Pattern,
    key: NoiseKey,
    scale: float,
    temperature: float,
    weight_reg: float,
    hard: bool,
) -> torch.Tensor:
    """The largest |found - right| / size of each block, fp64 [out, in / M], of a gradient `found` [out, in / M, C].

    Right is `reference.backward` in fp64. It is a difference of terms, scale / temperature * y (a - sum_c y_c a_c), and a itself a sum.
    The size is the same formula with every term positive: rounding is relative to it, and not to what remains of the difference.
    """
    inputs = (weight.double(), mask_logits.double(), pattern, key, scale, temperature)
    right, _ = reference.backward(grad.double(), *inputs, weight_reg, hard)
    probability = reference.probabilities(inputs[1], key, scale, temperature)
    mask = reference.mask_of(probability, pattern, hard)
    dense = inputs[0].view_as(mask).abs()
    scores = (grad.double().view_as(mask).abs() + 2 * weight_reg * dense * mask) * dense
    scores = scores @ pattern.candidates(dtype=mask.dtype, device=mask.device).T
    size = probability * (scores + (probability * scores).sum(-1, keepdim=True)) * (scale / temperature)
    return ((found.double() - right).abs() / size).amax(-1)
