"""`MaskedParameter` without logits: a dense weight or a fixed mask."""

from __future__ import annotations

import pytest
import torch

from maskllm.masking.parameter import Location, MaskedParameter
from maskllm.patterns import pack_mask


@pytest.mark.parametrize("fixed", [False, True])
def test_a_trainable_weight_without_logits_gets_the_masked_products_gradient(fixed):
    generator = torch.Generator().manual_seed(0)
    owner = torch.nn.Module()
    owner.weight = torch.nn.Parameter(torch.randn(3, 8, generator=generator))
    parameter = MaskedParameter(owner, Location("layer", 8))
    mask = torch.rand(3, 8, generator=generator) > 0.5 if fixed else torch.ones(3, 8, dtype=torch.bool)
    if fixed:
        owner.mask_bits = pack_mask(mask)
    inputs, grad = torch.randn(5, 8, generator=generator), torch.randn(5, 3, generator=generator)
    with parameter.weight_for_product() as weight:
        torch.nn.functional.linear(inputs, weight).backward(grad)
    torch.testing.assert_close(owner.weight.grad, grad.T @ inputs * mask)
