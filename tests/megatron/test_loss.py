"""The chunked loss against torch's cross-entropy, alone and with the vocabulary split over two ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maskllm.megatron import loss as loss_module
from maskllm.megatron.loss import frozen_linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 23, 16, 48


class OneRank:
    """A process group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    scale = torch.rand(TOKENS, generator=generator)
    return hidden, weight, labels, scale


def expected(cap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, labels, scale = problem()
    hidden.requires_grad_()
    logits = hidden @ weight.t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits, labels, reduction="none")
    (losses * scale).sum().backward()
    return losses.detach(), hidden.grad


def padded(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The matrix with `rows` more rows, which would win every softmax that they took part in."""
    return torch.cat([weight, 1e3 * torch.ones(rows, HIDDEN)])


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("padding", [0, 80])
@pytest.mark.parametrize("chunk_logits", [VOCABULARY, 5 * VOCABULARY, 1 << 25])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(monkeypatch, chunk_logits, padding, cap):
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", chunk_logits)
    hidden, weight, labels, scale = problem()
    hidden = hidden.float().requires_grad_()
    losses = frozen_linear_cross_entropy(hidden, padded(weight.float(), padding), labels, OneRank(), VOCABULARY, cap)
    (losses * scale).sum().backward()
    expected_losses, expected_gradient = expected(cap)
    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), expected_gradient, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    losses = frozen_linear_cross_entropy(hidden, weight, torch.tensor([1]), OneRank(), 3)
    losses.sum().backward()
    assert losses.item() == pytest.approx(2e4)
    assert hidden.grad.isfinite().all()


def test_a_trainable_output_matrix_is_refused():
    weight = torch.zeros(4, 2, requires_grad=True)
    with pytest.raises(ValueError, match="frozen"):
        frozen_linear_cross_entropy(torch.zeros(1, 2), weight, torch.zeros(1, dtype=torch.long), OneRank(), 4)


@pytest.mark.slow
def test_a_vocabulary_split_over_two_ranks_gives_the_same(ranks):
    ranks(2, "tests.megatron.test_loss")


def _rank_main() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    hidden, weight, labels, scale = problem()
    hidden = hidden.float().requires_grad_()
    expected_losses, expected_gradient = expected()
    for padding in (0, 2, 80):  # with 80 rows of padding the second rank has nothing else
        hidden.grad = None
        half = padded(weight.float(), padding).chunk(2)[dist.get_rank()]
        losses = frozen_linear_cross_entropy(hidden, half, labels, dist.group.WORLD, VOCABULARY)
        (losses * scale).sum().backward()
        dist.all_reduce(hidden.grad)
        torch.testing.assert_close(losses.detach().double(), expected_losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden.grad.double(), expected_gradient, rtol=1e-5, atol=1e-5)
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main()
