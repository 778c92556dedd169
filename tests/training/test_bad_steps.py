"""Steps with a loss or a gradient that is not finite: skipped on every rank, and several in a row end the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from maskllm.checkpoints.reading import resolve
from maskllm.training.step import all_finite
from tests.training.conftest import arguments, learned_tensors

POISON = 7
"""A token that the text does not contain. Its embedding is NaN in `poisoned_model`."""


def pruned_after(folder: Path, damage: Callable[[torch.nn.Module], None]) -> Path:
    """A tiny model, changed by `damage` and then pruned."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from maskllm.checkpoints.convert import convert
    from maskllm.patterns import Pattern
    from maskllm.pruning.megatron import prune_without_data
    from maskllm.pruning.solve import PruneSettings

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0))
    with torch.no_grad():
        damage(model)
    model.save_pretrained(folder / "hf")
    convert(str(folder / "hf"), str(folder / "dense"))
    prune_without_data(str(folder / "dense"), str(folder / "pruned"), PruneSettings("magnitude", Pattern(2, 4)))
    return folder / "pruned"


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model whose input embedding of POISON is NaN."""
    return pruned_after(tmp_path_factory.mktemp("poisoned"), lambda model: model.model.embed_tokens.weight[POISON].fill_(torch.nan))


@pytest.fixture(scope="module")
def poisoned_dataset(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: str) -> str:
    """`tiny_dataset` with POISON in some of its documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, get_bin_path, get_idx_path

    prefix = str(tmp_path_factory.mktemp("poisoned") / "data")
    source = IndexedDataset(tiny_dataset)
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=source.index.dtype)
    for index in range(len(source)):
        tokens = torch.from_numpy(source[index].astype("int64"))
        if index % 7 == 0:
            tokens[::40] = POISON
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(get_idx_path(prefix))
    return prefix


STEPS_WITH_POISON, BATCH, ROW = 24, 2, 3


@pytest.mark.slow
def test_bad_steps_are_skipped_on_every_rank_and_several_in_a_row_end_the_run(start, tmp_path, poisoned_model, poisoned_dataset):
    from maskllm.cli.train_options import parse_arguments
    from maskllm.training.data import build_batches

    save = tmp_path / "run"
    values = arguments(
        save, poisoned_dataset, poisoned_model, steps=STEPS_WITH_POISON, global_batch_size=BATCH, save_interval=1, max_bad_steps=ROW
    )
    # The data alone say which steps see the token. In some steps only one of the two data-parallel ranks has it.
    batches, _ = build_batches(parse_arguments(values), 256, torch.device("cpu"))
    poisoned = [
        [bool((batches[step * BATCH + rank].tokens == POISON).any()) for rank in range(BATCH)] for step in range(STEPS_WITH_POISON)
    ]
    bad = [any(step) for step in poisoned]
    last = next(step for step in range(ROW - 1, STEPS_WITH_POISON) if all(bad[step - ROW + 1 : step + 1]))
    assert any(bad[: last - ROW + 1]), "there is no bad step before those in a row"
    assert not all(bad[:last]), "there is no good step"
    for one_rank in ([True, False], [False, True]):
        assert one_rank in poisoned[: last + 1], "there is no step that is bad on that rank alone"

    run = start(2, values)
    assert run.end() == 1
    metrics = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in metrics] == [int(step) for step in bad[: last + 1]]
    assert [line["loss"] is None for line in metrics] == bad[: last + 1]

    first = bad.index(False) + 1
    kept = [f"iter_{step + 1:07d}" for step in range(last) if not bad[step]]
    assert sorted(path.name for path in save.glob("iter_*")) == kept, "wanted one after each good step"
    assert kept[0] == f"iter_{first:07d}", "a bad step before the first good one was saved"

    file = save / f"bad_batch_iter_{last + 1:07d}.safetensors"
    assert run.console.count(f"loss or gradient not finite in {ROW} steps in a row (--max-bad-steps); its batch is in {file}") == 1
    with safe_open(file, "pt") as saved:
        assert saved.metadata() == {"iteration": str(last + 1), "first_sample": str(last * BATCH)}
        expected = torch.cat([batches[last * BATCH + index].tokens for index in range(BATCH)])
        assert torch.equal(saved.get_tensor("tokens"), expected)
        assert torch.equal(saved.get_tensor("losses").isnan(), (expected == POISON).any(1))
    assert resolve(save).iteration == last + 1 - ROW
    assert "not finite on this rank" in run.log(1).read_text()

    seldom = tmp_path / "seldom"
    values[values.index("--save-interval") + 1] = "1000"
    for option in ("--save", "--load"):
        values[values.index(option) + 1] = str(seldom)
    run = start(None, [*values, "--async-save"])
    assert run.end() == 1
    assert run.console.rstrip().endswith(f"saved at iteration {last + 1 - ROW}"), "the good steps are lost"
    assert resolve(seldom).iteration == last + 1 - ROW


@pytest.mark.slow
def test_a_skipped_last_step_changes_nothing_and_counts_as_done(start, tmp_path, poisoned_model, poisoned_dataset):
    from maskllm.cli.train_options import parse_arguments
    from maskllm.training.data import build_batches

    for steps in range(2, STEPS_WITH_POISON):
        save = tmp_path / str(steps)
        values = arguments(save, poisoned_dataset, poisoned_model, steps=steps, global_batch_size=BATCH, save_interval=1)
        batches, _ = build_batches(parse_arguments(values), 256, torch.device("cpu"))
        bad = [any(bool((batches[step * BATCH + index].tokens == POISON).any()) for index in range(BATCH)) for step in range(steps)]
        if bad[-1] and not bad[-2]:
            break
    else:
        raise AssertionError("no run ends in a bad step after a good one")
    run = start(None, values)
    assert run.end() == 0
    assert resolve(save).iteration == steps
    before, after = (learned_tensors(save / f"iter_{number:07d}") for number in (steps - 1, steps))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def steep_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model with finite losses and infinite gradients.

    One output has enormous weights, and tiny embeddings make the norms' gradients large.
    """

    def steepen(model: torch.nn.Module) -> None:
        model.lm_head.weight[POISON].mul_(1e36)
        model.model.embed_tokens.weight.mul_(1e-3)

    return pruned_after(tmp_path_factory.mktemp("steep"), steepen)


@pytest.mark.slow
def test_bad_gradients_end_the_run_even_if_the_loss_is_finite(start, tmp_path, steep_model, tiny_dataset):
    save = tmp_path / "run"
    run = start(None, arguments(save, tiny_dataset, steep_model, max_bad_steps=2, save_interval=1))
    assert run.end() == 1
    assert not list(save.glob("iter_*")), "there is no optimizer state to save yet"
    assert "iteration 1: a gradient is not finite on this rank" in run.console + run.log(0).read_text()
    assert "iteration 2: loss or gradient not finite in 2 steps in a row" in run.console
    assert "there was no good step to save" in run.console
    with safe_open(save / "bad_batch_iter_0000002.safetensors", "pt") as saved:
        assert saved.get_tensor("losses").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("entries", "finite"),
    [
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),
        ([1.0, torch.inf], False),
        ([torch.inf, -torch.inf], False),
        ([torch.nan, 1.0], False),
    ],
)
def test_entries_that_are_not_finite_are_found(entries, finite, dtype):
    assert all_finite(torch.tensor(entries, dtype=dtype)) is finite
