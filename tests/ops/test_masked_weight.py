"""The masked weight and its gradients: kernels against the PyTorch reference, and the reference against the paper's formulas."""

import itertools
import math

import numpy as np
import psutil
import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import NoiseKey, ShardMap, masked_weight, philox_key, reference, winner_bits
from maskllm.ops.extension import has_kernels, kernels
from maskllm.ops.noise import gumbel, uniform_bits
from maskllm.patterns import Pattern
from tests.gradients import TOLERANCE, logits_gradient_error

TWO_OF_FOUR = Pattern(2, 4)


def _inputs(pattern, out, blocks, *, weight_dtype=torch.float32, logits_dtype=torch.float32, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, blocks * pattern.m, generator=generator).to(weight_dtype)
    logits = (torch.randn(out, blocks, pattern.num_candidates, generator=generator) * spread).to(logits_dtype)
    grad = torch.randn(out, blocks * pattern.m, generator=generator).to(weight_dtype)
    return weight, logits, grad


def _key(blocks, sample=0):
    return NoiseKey(philox_key(0, "layer"), sample, ShardMap(blocks))


def _run(weight, logits, grad, pattern, key, **options):
    """The outputs of the operator: masked weight, stats, gradient of the logits, gradient of the weight."""
    weight, logits = weight.clone().requires_grad_(), logits.clone().requires_grad_()
    stats = torch.zeros(2)
    masked = masked_weight(weight, logits, pattern=pattern, key=key, stats=stats, **options)
    masked.backward(grad)
    return masked.detach(), stats, logits.grad, weight.grad


def _expected(weight, logits, grad, pattern, key, scale, temperature, weight_reg=0.0, hard=False):
    """The same outputs from the reference, in fp64 for fp32 inputs."""
    double = logits.double() if logits.dtype == torch.float32 else logits
    masked, stats = reference.forward(weight, double, pattern, key, scale, temperature, hard, True)
    of_logits, of_weight = reference.backward(grad, weight, double, pattern, key, scale, temperature, weight_reg, hard)
    return masked, stats, of_logits, of_weight


def _assert_close(found, expected, tolerance, size=0.0):
    """Check the largest difference relative to the largest expected entry, or to `size` if that is larger."""
    assert torch.isfinite(found).all()
    assert (found.double() - expected.double()).abs().max().item() <= tolerance * max(expected.abs().max().item(), size)


SHAPES = [
    ("2:4", 1, 1),
    ("2:4", 1, 37),
    ("2:4", 33, 1),
    ("2:4", 7, 144),
    ("1:4", 5, 33),
    ("3:4", 4, 9),
    ("4:8", 3, 35),
    ("1:16", 2, 5),
    ("2:16", 2, 3),  # 120 candidates
    ("5:9", 3, 5),  # 126 candidates, the most of a learnable pattern with M up to 32
]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("pattern", "out", "blocks"), SHAPES)
def test_kernels_match_the_reference_over_shapes(instruction_set, pattern, out, blocks, hard):
    pattern = Pattern.parse(pattern)
    inputs = _inputs(pattern, out, blocks)
    options = {"scale": 3.0, "temperature": 0.7, "weight_reg": 0.1, "hard": hard}
    found = _run(*inputs, pattern, _key(blocks), **options)
    for result, expected in zip(found, _expected(*inputs, pattern, _key(blocks), **options), strict=True):
        _assert_close(result, expected, 4e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_a_gradient_that_cancels_is_as_exact_as_its_terms(instruction_set, hard):
    """Of 4000 blocks, none is further off than rounding explains; most are if a term is missing."""
    weight, logits, grad = _inputs(TWO_OF_FOUR, 4000, 1)
    draw = {"scale": 3.0, "temperature": 0.7}
    found = _run(weight, logits, grad, TWO_OF_FOUR, _key(1), **draw, weight_reg=0.1, hard=hard)[2].double()
    inputs = (grad, weight, logits, TWO_OF_FOUR, _key(1), *draw.values(), 0.1, hard)
    assert logits_gradient_error(found, *inputs).max() <= TOLERANCE

    probability = reference.probabilities(logits.double(), _key(1), **draw)
    mask = reference.mask_of(probability, TWO_OF_FOUR, hard)
    products = (grad.double().view_as(mask) - 0.2 * weight.view_as(mask) * mask) * weight.view_as(mask)
    terms = probability * (products @ TWO_OF_FOUR.candidates(dtype=torch.float64).T)
    largest = terms.gather(-1, terms.abs().argmax(-1, keepdim=True))[..., 0]
    for missing, least in ((terms.sum(-1), 3990), (largest, 3990), (terms[..., 0], 3000), (terms[..., 5], 3000)):
        wrong = found + probability * missing[..., None] * (3.0 / 0.7)
        assert (logits_gradient_error(wrong, *inputs) > TOLERANCE).sum() >= least
    without = reference.backward(grad, weight, *inputs[2:5], **draw, weight_reg=0.0, hard=hard)[0]
    assert (logits_gradient_error(without, *inputs) > TOLERANCE).sum() >= 3990


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_match_the_reference_over_dtypes(instruction_set, weight_dtype, logits_dtype):
    inputs = _inputs(TWO_OF_FOUR, 5, 45, weight_dtype=weight_dtype, logits_dtype=logits_dtype)
    options = {"scale": 2.0, "temperature": 1.0, "weight_reg": 0.05}
    masked, stats, of_logits, of_weight = _run(*inputs, TWO_OF_FOUR, _key(45), **options)
    expected = _expected(*inputs, TWO_OF_FOUR, _key(45), **options)
    assert (masked.dtype, of_logits.dtype, of_weight.dtype) == (weight_dtype, logits_dtype, weight_dtype)
    rounding = torch.finfo(weight_dtype).eps
    _assert_close(masked, expected[0], max(rounding, 2e-6))
    _assert_close(stats, expected[1], 2e-6)
    _assert_close(of_logits, expected[2], max(torch.finfo(logits_dtype).eps, 4e-6))
    _assert_close(of_weight, expected[3], max(rounding, 4e-6))


@pytest.mark.parametrize(("temperature", "scale"), list(itertools.product([0.01, 0.3, 10.0], [1.0, 100.0, 1e4])))
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
def test_extremes_stay_finite_and_near_the_reference(instruction_set, temperature, scale, spread):
    """The temperature divides a score's error, so the tolerance is a few units in the last place of the largest score."""
    weight, logits, grad = _inputs(TWO_OF_FOUR, 4, 65, spread=spread)
    logits = logits.clamp(-1e3, 1e3)
    logits[0, 0] = torch.tensor([1e3, -1e3, 1e3, -1e3, 0.0, 1e3])
    options = {"scale": scale, "temperature": temperature}
    found = _run(weight, logits, grad, TWO_OF_FOUR, _key(65), **options)
    assert all(torch.isfinite(result).all() for result in found)
    expected = _expected(weight, logits, grad, TWO_OF_FOUR, _key(65), **options)
    # Only scores within 20 of the largest one matter: e^-20 is below the tolerance.
    tolerance = 5e-7 * (5 + 20 / temperature)
    # A gradient is a difference of terms of this size. The difference itself may be much smaller.
    sizes = (0.0, 0.0, scale / temperature * (grad * weight).abs().max().item(), 0.0)
    for result, wanted, size in zip(found, expected, sizes, strict=True):
        _assert_close(result, wanted, tolerance, size)


def test_both_ends_of_the_uniform_draw_stay_finite(instruction_set):
    """Draws this close to 0 and 1 occur once in a million. The test searches the counters for blocks that have them."""
    key = _key(1 << 17)
    drawn = uniform_bits(key, 1, 1 << 17, 6)[0]
    for extreme in (drawn.min(), drawn.max()):
        block = (drawn == extreme).any(-1).nonzero()[0].item()
        assert min(extreme.item(), (1 << 21) - 1 - extreme.item()) < 16
        place = NoiseKey(key.key, key.sample, ShardMap(1 << 17, block_offset=block))
        weight, logits, grad = _inputs(TWO_OF_FOUR, 1, 1)
        for temperature in (0.01, 4.0):
            options = {"scale": 1.0, "temperature": temperature}
            found = _run(weight, logits, grad, TWO_OF_FOUR, place, **options)
            expected = _expected(weight, logits, grad, TWO_OF_FOUR, place, **options)
            sizes = (0.0, 0.0, (grad * weight).abs().max().item() / temperature, 0.0)
            for result, wanted, size in zip(found, expected, sizes, strict=True):
                _assert_close(result, wanted, 4e-6 / min(temperature, 1.0), size)


@pytest.mark.parametrize("shard", [ShardMap(50, 3, 2), ShardMap(7, 0, 5, 3, 40), ShardMap(1 << 40, 9, 11, 4, 1 << 20)])
def test_shards_draw_the_noise_of_their_place_in_the_whole_tensor(instruction_set, shard):
    key = NoiseKey(0xF00DFACE12345678, (7 << 32) + 1, shard)
    inputs = _inputs(TWO_OF_FOUR, 9, 7)
    options = {"scale": 1.0, "temperature": 0.5}
    for result, wanted in zip(
        _run(*inputs, TWO_OF_FOUR, key, **options), _expected(*inputs, TWO_OF_FOUR, key, **options), strict=True
    ):
        _assert_close(result, wanted, 4e-6)


def test_instruction_sets_and_threads_agree():
    if kernels() is None:
        pytest.skip("the kernels were not built")
    inputs = _inputs(TWO_OF_FOUR, 40, 330)
    threads, results = torch.get_num_threads(), {}
    try:
        for name in kernels().instruction_sets():
            kernels().use_instruction_set(name)
            for count in (1, 2):
                torch.set_num_threads(count)
                results[name, count] = _run(*inputs, TWO_OF_FOUR, _key(330), scale=5.0, temperature=0.5, weight_reg=1e-3)
            for one, two in zip(results[name, 1], results[name, 2], strict=True):
                assert torch.equal(one, two)
            for one, other in zip(results[name, 1], next(iter(results.values())), strict=True):
                _assert_close(one, other, 2e-6)
    finally:
        torch.set_num_threads(threads)
        kernels().use_instruction_set(kernels().instruction_sets()[0])


def test_a_large_matrix_matches_the_reference():
    """256 rows of a LLaMA projection: 64 chunks of blocks, whose sums are added up in `stats`."""
    inputs = _inputs(TWO_OF_FOUR, 256, 1024, weight_dtype=torch.bfloat16)
    found = _run(*inputs, TWO_OF_FOUR, _key(1024), scale=100.0, temperature=4.0)
    rounding = torch.finfo(torch.bfloat16).eps
    tolerances = (rounding, 1e-5, 2e-5, rounding)
    for result, expected, tolerance in zip(found, _expected(*inputs, TWO_OF_FOUR, _key(1024), 100.0, 4.0), tolerances, strict=True):
        _assert_close(result, expected, tolerance)


def test_forward_is_the_papers_formula():
    """Gumbel-softmax of the scaled logits times the candidate matrix, written out for each block."""
    weight, logits, _ = _inputs(TWO_OF_FOUR, 2, 3)
    key, candidates = _key(3), TWO_OF_FOUR.candidates(dtype=torch.float64)
    noise = gumbel(key, 2, 3, 6, torch.float64, "cpu")
    masked = masked_weight(weight, logits, pattern=TWO_OF_FOUR, key=key, scale=2.0, temperature=0.5)
    for row, block in itertools.product(range(2), range(3)):
        scores = [math.exp((2.0 * logits[row, block, c].item() + noise[row, block, c].item()) / 0.5) for c in range(6)]
        for j in range(4):
            kept = sum(score for score, candidate in zip(scores, candidates, strict=True) if candidate[j]) / sum(scores)
            column = 4 * block + j
            assert masked[row, column].item() == pytest.approx(weight[row, column].item() * kept, rel=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:5"])
def test_gradients_are_finite_differences(pattern):
    """The objective is `sum(grad * masked) - weight_reg * ||masked||^2` in fp64; both gradients are checked."""
    pattern, weight_reg = Pattern.parse(pattern), 0.1
    weight, logits, grad = (tensor.double() for tensor in _inputs(pattern, 2, 2))

    def objective(weight, logits):
        masked, _ = reference.forward(weight, logits, pattern, _key(2), 2.0, 0.7, False, False)
        return (grad * masked).sum() - weight_reg * masked.square().sum()

    of_logits, of_weight = reference.backward(grad, weight, logits, pattern, _key(2), 2.0, 0.7, weight_reg, False)
    step = 1e-6
    for tensor, found in ((logits, of_logits), (weight, of_weight)):
        for index in range(tensor.numel()):
            values = []
            for sign in (1, -1):
                moved = tensor.clone()
                moved.view(-1)[index] += sign * step
                values.append(objective(weight, moved) if tensor is logits else objective(moved, logits))
            slope = (values[0] - values[1]).item() / (2 * step)
            assert found.view(-1)[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_hard_masks_keep_n_of_m_and_pass_the_soft_gradient():
    weight, logits, grad = _inputs(TWO_OF_FOUR, 6, 20)
    weight = weight.abs() + 0.1
    hard = _run(weight, logits, grad, TWO_OF_FOUR, _key(20), scale=2.0, temperature=0.5, hard=True)
    soft = _run(weight, logits, grad, TWO_OF_FOUR, _key(20), scale=2.0, temperature=0.5, hard=False)
    assert ((hard[0] != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert torch.equal(hard[0][hard[0] != 0], weight[hard[0] != 0])
    torch.testing.assert_close(hard[2], soft[2])


def test_draws_follow_the_softmax():
    """Chi-square test of hard draws at temperature 1 against softmax(scale * l) (the Gumbel-max trick), 5 degrees of freedom."""
    scale, draws = 2.0, 20000
    logits = torch.tensor([0.0, 0.3, -0.4, 0.8, 0.1, -1.0]).expand(draws, 1, 6).contiguous()
    masked = masked_weight(torch.ones(draws, 4), logits, pattern=TWO_OF_FOUR, key=_key(1), scale=scale, temperature=1.0, hard=True)
    chosen = (masked.unsqueeze(1) == TWO_OF_FOUR.candidates()).all(-1)
    assert (chosen.sum(-1) == 1).all()
    expected = torch.softmax(scale * logits[0, 0].double(), -1) * draws
    chi_square = ((chosen.sum(0) - expected).square() / expected).sum().item()
    assert chi_square < 20.5  # exceeded once in a thousand


def test_the_same_key_draws_the_same_mask_and_another_sample_draws_another():
    weight, logits, _ = _inputs(TWO_OF_FOUR, 4, 32)
    drawn = [
        masked_weight(weight, logits, pattern=TWO_OF_FOUR, key=_key(32, sample), scale=1.0, temperature=0.5) for sample in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_added_to_main_grad(logits_dtype):
    weight, logits, grad = _inputs(TWO_OF_FOUR, 3, 40, logits_dtype=logits_dtype)
    options = {"scale": 2.0, "temperature": 0.5, "weight_reg": 0.1}
    expected = _expected(weight, logits.float(), grad, TWO_OF_FOUR, _key(40), **options)[2]
    parameter = torch.nn.Parameter(logits)
    flat = torch.ones(parameter.numel() + 8)
    parameter.main_grad = flat[8:].view(parameter.shape)
    for _ in range(2):
        masked_weight(weight, parameter, pattern=TWO_OF_FOUR, key=_key(40), **options).backward(grad)
    assert parameter.grad is None
    assert parameter.grad_added_to_main_grad
    _assert_close(parameter.main_grad, 1 + 2 * expected, 4e-6)
    assert (flat[:8] == 1).all()


def test_a_gradient_with_other_strides_and_a_frozen_weight_work():
    weight, logits, grad = _inputs(TWO_OF_FOUR, 4, 1)
    logits.requires_grad_()
    masked = masked_weight(weight, logits, pattern=TWO_OF_FOUR, key=_key(1), scale=1.0, temperature=1.0)
    masked.backward(grad.T.contiguous().T)
    expected = _expected(weight, logits.detach(), grad, TWO_OF_FOUR, _key(1), 1.0, 1.0)[2]
    _assert_close(logits.grad, expected, 4e-6)


def test_operator_passes_opcheck():
    weight, logits, grad = _inputs(TWO_OF_FOUR, 3, 5)
    draw = (2, 4, -3, 7, [5, 0, 0, 3, 0], 2.0, 0.5, 0.1, False)
    torch.library.opcheck(torch.ops.maskllm.masked_weight.default, (weight.requires_grad_(), logits.requires_grad_(), *draw, True))
    arguments = (grad, weight.detach(), logits.detach(), *draw, torch.zeros_like(logits.detach()), True, torch.zeros_like(grad))
    torch.library.opcheck(torch.ops.maskllm.masked_weight_backward.default, arguments)


def _zeros(device: str, *shape: int) -> torch.Tensor:
    """bf16 zeros. On a CPU they take memory only once they are written (calloc)."""
    if device == "cuda":
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)
    return torch.from_numpy(np.zeros(shape, dtype=np.int16)).view(torch.bfloat16)


@pytest.mark.long
@pytest.mark.skipif(psutil.virtual_memory().available < 16e9, reason="needs 16 GB of memory")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_indices_beyond_32_bits(device):
    """A row of more than 2^31 weights and 3.2e9 logits. The reference computes the last 40 blocks alone, and they match."""
    if not has_kernels(device) or (device == "cuda" and not torch.cuda.is_available()):
        pytest.skip(f"needs {device} kernels")
    blocks, end = (1 << 29) + 40, 40
    inputs = _inputs(TWO_OF_FOUR, 1, end, weight_dtype=torch.bfloat16, logits_dtype=torch.bfloat16)
    weight, logits, grad = _zeros(device, 1, 4 * blocks), _zeros(device, 1, blocks, 6), _zeros(device, 1, 4 * blocks)
    weight[:, -4 * end :], logits[:, -end:], grad[:, -4 * end :] = inputs
    key = _key(blocks)
    masked = masked_weight(weight, logits, pattern=TWO_OF_FOUR, key=key, scale=2.0, temperature=0.5)[:, -4 * end :].clone().cpu()
    winners = winner_bits(logits, TWO_OF_FOUR)[:, -end // 2 :].cpu()
    draw = (2, 4, key.signed_key, key.sample, key.shard.numbers(), 2.0, 0.5, 0.0, False)
    of_logits = torch.empty_like(logits)
    torch.ops.maskllm.masked_weight_backward(grad, weight, logits, *draw, of_logits, False, None)
    last = NoiseKey(key.key, key.sample, ShardMap(blocks, block_offset=blocks - end))
    expected = _expected(*inputs, TWO_OF_FOUR, last, 2.0, 0.5)
    rounding = torch.finfo(torch.bfloat16).eps
    _assert_close(masked, expected[0], rounding)
    _assert_close(of_logits[:, -end:].cpu(), expected[2], rounding)
    assert torch.equal(winners, reference.winner_bits(inputs[1], TWO_OF_FOUR))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"scale": math.inf}, "scale inf"),
        ({"pattern": Pattern(1, 4)}, r"mask_logits \[2, 3, 6\]: for pattern 1:4"),
        ({"pattern": Pattern(8, 16)}, "12870 candidate"),
        ({"weight": torch.ones(2, 12, dtype=torch.float64)}, "torch.float64"),
        ({"weight": torch.ones(12, 2).T}, "contiguous"),
        ({"mask_logits": torch.ones(2, 3, 6, dtype=torch.float16)}, "mask_logits is torch.float16"),
        ({"stats": torch.ones(3)}, r"stats is torch.float32 \[3\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"weight": torch.ones(2, 12), "mask_logits": torch.ones(2, 3, 6), "pattern": TWO_OF_FOUR}
    arguments |= {"key": _key(3), "scale": 1.0, "temperature": 1.0} | change
    weight, mask_logits = arguments.pop("weight"), arguments.pop("mask_logits")
    with pytest.raises(MaskLLMError, match=message):
        masked_weight(weight, mask_logits, **arguments)
