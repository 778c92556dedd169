"""Validation with the winners: they are found once a validation, and the losses are those of finding them for each product."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskllm import train
from maskllm.masking import parameter
from maskllm.masking.parameter import MaskedParameter
from maskllm.ops import winner_mask

ITERATIONS, LINEARS, BATCHES, MICRO_BATCHES = 3, 4 * 4, 2, 2


def validations(save: Path, dataset: str, start: Path) -> list[dict[str, float]]:
    """The validation losses of a run that validates after each step."""
    options = {
        "--data-path": dataset, "--load": start, "--save": save, "--train-iters": ITERATIONS, "--global-batch-size": MICRO_BATCHES,
        "--seq-length": 32, "--lr": 0.5, "--params-dtype": "fp32", "--split": "80,20,0", "--eval-interval": 1, "--eval-iters": BATCHES,
    }  # fmt: skip
    assert train.main([str(part) for option in options.items() for part in option]) == 0
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "validation"]


@pytest.mark.usefixtures("signal_handlers")
def test_winners_are_found_once_a_validation_with_the_same_losses(tmp_path, tiny_dataset, tiny_pruned, monkeypatch):
    searches, products = [], []
    find, effective_weight = parameter.winner_bits_of_all, MaskedParameter.effective_weight

    def counted(all_logits, pattern):
        searches.append(len(all_logits))
        return find(all_logits, pattern)

    def found_for_each_product(self):
        if self._winner is None:
            return effective_weight(self)
        products.append(self.location.name)
        return self.weight * winner_mask(self.logits, self.sampler.pattern)

    monkeypatch.setattr(parameter, "winner_bits_of_all", counted)
    found = validations(tmp_path / "once", tiny_dataset, tiny_pruned)
    assert searches == [LINEARS] * ITERATIONS
    monkeypatch.setattr(MaskedParameter, "effective_weight", found_for_each_product)
    expected = validations(tmp_path / "each", tiny_dataset, tiny_pruned)
    assert len(products) == ITERATIONS * LINEARS * BATCHES * MICRO_BATCHES
    assert found == expected, "to the bit"
    assert len({line["loss_winner"] for line in found}) == ITERATIONS, "the winners follow the logits"
    assert all(line["loss_winner"] != line["loss_sampled"] for line in found)
