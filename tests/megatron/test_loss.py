"""The chunked losses against torch's, alone and with the vocabulary split over two ranks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from maskllm.megatron import loss as loss_module
from maskllm.megatron.loss import LossTerms, linear_losses

TOKENS, HIDDEN, VOCABULARY = 23, 16, 48


class OneRank:
    """A process group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@dataclass
class Problem:
    """Two models' hidden states and output matrices in fp64."""

    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    teacher: tuple[torch.Tensor, torch.Tensor]


def problem() -> Problem:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, their_hidden, their_weight = (
        torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64) for rows in (TOKENS, VOCABULARY) * 2
    )
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return Problem(hidden, weight, labels, (their_hidden, their_weight))


def expected(terms: LossTerms, cap: float | None = None) -> list[torch.Tensor]:
    """Mean loss, cross-entropies, divergences, and the gradients of hidden states and output matrix, by whole tensors in fp64."""

    def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        product = hidden @ weight.t()
        return product if cap is None else cap * torch.tanh(product / cap)

    given = problem()
    inputs = [given.hidden.requires_grad_(), given.weight.requires_grad_()]
    ours, theirs, t = logits(*inputs), logits(*given.teacher), terms.temperature
    ce = F.cross_entropy(ours, given.labels, reduction="none")
    kl = t**2 * F.kl_div((ours / t).log_softmax(-1), (theirs / t).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    mean = (terms.ce * ce + terms.kl * kl).mean()
    return [mean.detach(), ce.detach(), kl.detach(), *torch.autograd.grad(3 * mean, inputs)]


def padded(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The matrix with `rows` more rows, which would win every softmax that they took part in."""
    return torch.cat([weight, 1e3 * torch.ones(rows, HIDDEN)])


def found(terms: LossTerms, padding: int, cap: float | None, group: object, ranks: int = 1) -> list[torch.Tensor]:
    """What `expected` gives, from this rank's rows of the output matrices; the gradient of the hidden states is this rank's part."""
    given = problem()
    hidden = given.hidden.float().requires_grad_()
    weight, their_weight = (padded(each.float(), padding).chunk(ranks)[group.rank()] for each in (given.weight, given.teacher[1]))
    weight = weight.clone().requires_grad_()
    teacher = (given.teacher[0].float(), their_weight) if terms.kl else None
    losses = linear_losses(hidden, weight, given.labels, group, VOCABULARY, cap, terms=terms, teacher=teacher)
    gradients = torch.autograd.grad(3 * losses.mean, [hidden, weight])
    return [part.detach() for part in (*losses, *gradients)]


ALONE = LossTerms()
TERMS = [ALONE, LossTerms(0.0, 1.0), LossTerms(0.5, 0.7, 3.0)]


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor], terms: LossTerms) -> None:
    for name, one, other in zip(("mean", "ce", "kl", "of hidden", "of weight"), found, wanted, strict=True):
        if terms.kl or name != "kl":
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("padding", [0, 80])
@pytest.mark.parametrize("chunk_logits", [VOCABULARY, 5 * VOCABULARY, 1 << 25])
def test_the_losses_and_their_gradients_are_those_of_whole_tensors(monkeypatch, chunk_logits, padding, cap, terms):
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", chunk_logits)
    result = found(terms, padding, cap, OneRank())
    result[-1] = result[-1][:VOCABULARY]
    assert_equal(result, expected(terms, cap), terms)


def test_a_teacher_that_predicts_the_same_has_no_divergence():
    given = problem()
    hidden, weight = given.hidden.float().requires_grad_(), given.weight.float()
    same = (hidden.detach(), weight)
    losses = linear_losses(hidden, weight, given.labels, OneRank(), VOCABULARY, terms=LossTerms(0.0, 1.0), teacher=same)
    losses.mean.backward()
    assert losses.kl.abs().max() < 1e-5
    assert hidden.grad.abs().max() < 1e-6


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_chunks_of_all_tensors_together_hold_at_most_two_of_the_largest(monkeypatch, terms):
    """With a teacher there are up to five tensors of a chunk's size; their sizes add up to twice MAX_CHUNK_LOGITS at most."""
    monkeypatch.setattr(loss_module, "MAX_CHUNK_LOGITS", 12 * VOCABULARY)
    sizes = []
    exp = torch.Tensor.exp_
    monkeypatch.setattr(torch.Tensor, "exp_", lambda logits: sizes.append(logits.shape[0]) or exp(logits))
    found(terms, 0, None, OneRank())
    tensors = 1 if terms.kl == 0 else 4 + (terms.temperature != 1)
    assert max(sizes) == (12 if terms.kl == 0 else 24 // tensors)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4, -1e4]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    teacher = (-hidden.detach(), weight)
    losses = linear_losses(hidden, weight, torch.tensor([1]), OneRank(), 3, terms=LossTerms(1.0, 1.0), teacher=teacher)
    losses.mean.backward()
    assert losses.cross_entropy.item() == losses.kl.item() == pytest.approx(2e4)
    assert hidden.grad.isfinite().all()


@pytest.mark.slow
def test_a_vocabulary_split_over_two_ranks_gives_the_same(ranks):
    ranks(2, "tests.megatron.test_loss")


def _rank_main() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    for terms in TERMS:
        for padding in (0, 2, 80):  # with 80 rows of padding the second rank has nothing else
            parts = found(terms, padding, 2.0, dist.group.WORLD, ranks=2)
            dist.all_reduce(parts[3])
            whole = torch.empty(2 * parts[4].shape[0], HIDDEN)
            dist.all_gather_into_tensor(whole, parts[4])
            assert_equal([*parts[:4], whole[:VOCABULARY]], expected(terms, 2.0), terms)
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main()
