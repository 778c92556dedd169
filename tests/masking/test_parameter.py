"""A weight with its mask, without any framework: dense, with a fixed mask, with drawn masks and with the winner."""

from __future__ import annotations

import weakref

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.masking.draw import Draw, open_draw
from maskllm.masking.parameter import Location, MaskedParameter, use_winners
from maskllm.masking.sampler import MaskSampler
from maskllm.patterns import Pattern, pack_mask, unpack_mask

OUT, IN = 6, 16
PATTERN = Pattern(2, 4)


def masked(*, transposed: bool = False) -> MaskedParameter:
    """The weight of a linear without a mask."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.nn.Module()
    weight = torch.randn(OUT, IN, generator=generator)
    owner.weight = torch.nn.Parameter(weight.t().contiguous() if transposed else weight, requires_grad=False)
    return MaskedParameter(owner, Location("layer", IN), transposed=transposed)


def two_of_four() -> torch.Tensor:
    """A mask, bool [OUT, IN]."""
    places = torch.rand(OUT, IN // 4, 4, generator=torch.Generator().manual_seed(1)).topk(2, -1).indices
    return torch.zeros(OUT, IN // 4, 4).scatter_(-1, places, 1).view(OUT, IN).bool()


@pytest.mark.parametrize("transposed", [False, True])
def test_without_logits_the_weight_is_dense_or_times_the_fixed_mask(transposed):
    parameter = masked(transposed=transposed)
    dense = parameter.effective_weight().clone()
    assert dense.shape == parameter.shape == (OUT, IN)
    parameter.attach_bits()
    assert not parameter.effective_weight().any(), "the mask is empty until a checkpoint fills it"
    mask = two_of_four()
    parameter.bits.copy_(pack_mask(mask))
    assert torch.equal(parameter.effective_weight(), dense * mask)


def test_the_draw_decides_the_mask_and_the_winner_needs_none():
    parameter = masked()
    sampler = MaskSampler(PATTERN, scale=2.0, temperature=1.0)
    parameter.attach_logits(sampler)
    parameter.reset()

    def drawn(sample: int) -> torch.Tensor:
        with open_draw(Draw(sample)):
            return parameter.effective_weight()

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    with pytest.raises(RuntimeError, match="no draw of masks is open"):
        parameter.effective_weight()
    best = PATTERN.candidates(device="cpu")[parameter.logits.argmax(-1)].view(OUT, IN)
    with use_winners([parameter]):
        assert torch.equal(parameter.effective_weight(), parameter.weight * best)
    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), parameter.weight * best)
    assert torch.equal(unpack_mask(parameter.winner_bits(), IN), best.bool())


def test_a_strong_prior_wins_in_every_block():
    parameter = masked()
    parameter.attach_bits()
    parameter.bits.copy_(pack_mask(two_of_four()))
    parameter.attach_logits(MaskSampler(PATTERN))
    parameter.reset(prior_strength=20.0)
    assert torch.equal(parameter.winner_bits(), pack_mask(two_of_four()))


def test_recomputed_passes_add_nothing_to_the_statistics():
    parameter = masked()
    sampler = MaskSampler(PATTERN, stats=torch.zeros(2))
    parameter.attach_logits(sampler)
    with open_draw(Draw(5)):
        weight = parameter.effective_weight()
    assert sampler.stats[0].item() == pytest.approx(weight.square().sum().item(), rel=1e-6)
    before = sampler.stats.clone()
    with open_draw(Draw(5, recomputing=True)):
        assert torch.equal(parameter.effective_weight(), weight)
    assert torch.equal(sampler.stats, before)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_trainable_weight_without_logits_gets_the_masked_products_gradient(fixed):
    parameter = masked()
    weight = parameter.weight.requires_grad_()
    mask = torch.ones(OUT, IN)
    if fixed:
        parameter.attach_bits()
        parameter.bits.copy_(pack_mask(two_of_four()))
        mask = two_of_four()
    generator = torch.Generator().manual_seed(2)
    inputs, grad = torch.randn(5, IN, generator=generator), torch.randn(5, OUT, generator=generator)
    with parameter.weight_for_product() as product:
        torch.nn.functional.linear(inputs, product).backward(grad)
    torch.testing.assert_close(weight.grad, grad.T @ inputs * mask)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_recomputed_masked_weight_gives_the_same_gradients_without_being_kept(transposed):
    def gradients(recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
        parameter = masked(transposed=transposed)
        parameter.attach_logits(MaskSampler(PATTERN, weight_reg=0.1, recompute_masked_weight=recompute))
        inputs = torch.randn(3, IN, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with open_draw(Draw(5)), parameter.weight_for_product() as weight:
            output = inputs @ weight.t()
        kept = weakref.ref(weight)
        del weight
        assert (kept() is None) == recompute
        with open_draw(Draw(6)):  # another micro-batch goes forward in between
            parameter.effective_weight()
        output.square().sum().backward()
        return parameter.logits.grad, inputs.grad

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert one.any() and torch.equal(one, other)


def test_rows_of_broken_blocks_are_refused():
    owner = torch.nn.Module()
    owner.weight = torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False)
    with pytest.raises(MaskLLMError, match="layer"):
        MaskedParameter(owner, Location("layer", 6)).attach_logits(MaskSampler(PATTERN))


def test_winners_are_those_of_the_blocks_beginning():
    parameters = [masked() for _ in range(3)]
    for parameter in parameters[:2]:
        parameter.attach_logits(MaskSampler(PATTERN))
        parameter.reset()
    expected = [parameter.weight * unpack_mask(parameter.winner_bits(), IN) for parameter in parameters[:2]]
    with use_winners(parameters):
        for _ in range(3):
            for parameter, weight in zip(parameters, expected, strict=False):
                assert torch.equal(parameter.effective_weight(), weight)
                parameter.logits.data.neg_()
        assert torch.equal(parameters[2].effective_weight(), parameters[2].weight), "it has no logits"
    for parameter in parameters[:2]:
        with pytest.raises(RuntimeError, match="no draw of masks is open"):
            parameter.effective_weight()


def test_a_diverged_logit_is_found_in_any_of_the_weights():
    parameters = [masked() for _ in range(3)]
    for parameter in parameters:
        parameter.attach_logits(MaskSampler(PATTERN))
    parameters[1].logits.data[4, 2, 5] = torch.nan
    with pytest.raises(MaskLLMError, match="NaN in row 4, block 2"), use_winners(parameters):
        pass


def scaled_parts(parts: int, *, recompute: bool = False) -> list[MaskedParameter]:
    """A weight [OUT, 24] with its scales, cut along its columns as tensor-parallel ranks hold it."""
    weight = torch.randn(OUT, 24, generator=torch.Generator().manual_seed(0))
    scales = torch.rand(OUT, 2, generator=torch.Generator().manual_seed(1)) + 0.5
    found = []
    for index, part in enumerate(weight.chunk(parts, 1)):
        owner = torch.nn.Module()
        owner.weight = torch.nn.Parameter(part.contiguous())
        found.append(MaskedParameter(owner, Location("layer", 24, column_offset=index * part.shape[1])))
        found[-1].attach_scales(MaskSampler(PATTERN, recompute_masked_weight=recompute))
        found[-1].scales.data.copy_(scales)
    return found


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_the_parts_of_a_scaled_weight_are_those_of_the_whole(parts):
    """Also parts that lie in both groups of columns. The sum of the parts' gradients of the scales is the whole's."""
    (whole,) = scaled_parts(1)
    grad = torch.randn(OUT, 24, generator=torch.Generator().manual_seed(2))
    whole.effective_weight().backward(grad)
    expected = whole.weight * whole.scales.repeat_interleave(12, 1)
    assert torch.equal(whole.effective_weight(), expected)
    cut = scaled_parts(parts)
    assert torch.equal(torch.cat([part.effective_weight() for part in cut], 1), expected)
    for part, gradient in zip(cut, grad.chunk(parts, 1), strict=True):
        part.effective_weight().backward(gradient)
    torch.testing.assert_close(sum(part.scales.grad for part in cut), whole.scales.grad)
    assert torch.equal(torch.cat([part.weight.grad for part in cut], 1), whole.weight.grad)


def test_the_winner_of_a_scaled_weight_keeps_its_largest_weights():
    (parameter,) = scaled_parts(1)
    dense = parameter.effective_weight()
    with use_winners([parameter]):
        sparse = parameter.effective_weight()
    kept = sparse != 0
    assert torch.equal(sparse, dense * kept)
    blocks = parameter.weight.abs().view(OUT, 6, 4)
    assert torch.equal(kept.view(OUT, 6, 4), blocks >= blocks.topk(2, -1).values[..., 1:])
    assert torch.equal(parameter.effective_weight(), dense), "the winner is for its block alone"


def test_a_recomputed_scaled_weight_gives_the_same_gradients_without_being_kept():
    def gradients(recompute: bool) -> list[torch.Tensor]:
        (parameter,) = scaled_parts(1, recompute=recompute)
        inputs = torch.randn(3, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with parameter.weight_for_product() as weight:
            output = inputs @ weight.t()
        kept = weakref.ref(weight)
        del weight
        assert (kept() is None) == recompute
        output.square().sum().backward()
        return [parameter.scales.grad, parameter.weight.grad, inputs.grad]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert one.any() and torch.equal(one, other)
