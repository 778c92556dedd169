"""The same training in both frames: the same masks from the same seed, and losses equal to rounding."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from maskllm import train
from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.finetuning import SparseTrainer, SparseTrainingArguments
from maskllm.huggingface import sparsify
from maskllm.huggingface.mask_file import open_mask_file
from maskllm.pruning import PruneSettings, prune_hf
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import build_batches
from tests.families.tiny import CONFIGS, write_tiny
from tests.huggingface.test_masked_linear import fused_locations

STEPS, BATCHES, TOKENS = 10, 2, 32
SHARED = {"kl_temperature": 2.0, "ce_loss_coeff": 0.5, "kl_loss_coeff": 0.5, "squarehead_loss_coeff": 0.1}
"""Options that have one name in both frames."""
WEIGHT_REG = 1e-3

pytestmark = [pytest.mark.usefixtures("signal_handlers"), pytest.mark.slow]


@pytest.mark.parametrize("trained", ["masks", "weights", "both"])
def test_ten_steps_in_both_frames(trained, tmp_path, tiny_dataset, monkeypatch):
    monkeypatch.setitem(
        CONFIGS, "smol", CONFIGS["llama2"] | {"num_key_value_heads": 1, "vocab_size": 256, "tie_word_embeddings": True}
    )
    write_tiny("smol", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    assert main(["prune", "--load", str(tmp_path / "dense"), "--output", str(tmp_path / "pruned"), "--method", "magnitude"]) == 0
    options = {
        "data_path": tiny_dataset, "pretrained_checkpoint": tmp_path / "pruned", "save": tmp_path / "run", "train": trained,
        "train_iters": STEPS, "global_batch_size": BATCHES, "seq_length": TOKENS, "lr_decay_style": "constant",
        "params_dtype": "fp32", "eval_iters": 0, "log_interval": 1, **SHARED,
    }  # fmt: skip
    if trained != "masks":
        options |= {"weights_lr": 1e-3}
    if trained != "weights":
        options |= {"lr": 0.01, "weight_reg": WEIGHT_REG}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert train.main(words) == 0
    expected = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for verb, *more in (
        ("trim", "--load", tmp_path / "run", "--output", tmp_path / "trimmed"),
        ("export", "--load", tmp_path / "trimmed", "--output", tmp_path / "out", "--mask-file", tmp_path / "masks.npz"),
    ):
        assert main([verb, *map(str, more)]) == 0

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    dense = copy.deepcopy(model)
    masks = prune_hf(copy.deepcopy(model), torch.zeros(1, 4, dtype=torch.long), PruneSettings("magnitude")).unpacked(model)
    locations = fused_locations(model, resolve(tmp_path / "dense").model_config)
    for parameter in (*model.model.embed_tokens.parameters(), *model.model.norm.parameters()):
        parameter.requires_grad_(False)  # Megatron's default
    sparsify(model, "2:4", train=trained, masks=masks, locations=locations)
    settings = TrainArguments(
        data_path=[tiny_dataset], train_iters=STEPS, global_batch_size=BATCHES, seq_length=TOKENS, eval_iters=0
    )
    batches, _ = build_batches(settings, 256, torch.device("cpu"))
    data = [
        {"input_ids": batch.tokens[0], "labels": batch.tokens[0], "shift_labels": batch.labels[0]}
        for batch in (batches[index] for index in range(STEPS * BATCHES))
    ]
    arguments = SparseTrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, max_steps=STEPS,
        per_device_train_batch_size=1, gradient_accumulation_steps=BATCHES, train_sampling_strategy="sequential",
        remove_unused_columns=False, lr_scheduler_type="constant", learning_rate=1e-3 if trained == "weights" else 0.01,
        weight_decay=0.0 if trained == "weights" else 0.1, weights_learning_rate=1e-3, adam_beta2=0.95, adam_epsilon=1e-5,
        weight_reg=WEIGHT_REG, **SHARED,
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
            assert found[ours] == pytest.approx(wanted[theirs], rel=1e-4, abs=1e-7), (wanted["iteration"], ours)

    plain, kept = trainer.finish()
    file, exported = open_mask_file(tmp_path / "masks.npz"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert set(file.names) == set(kept)
    same = torch.cat([(file.mask(name, tuple(mask.shape)) == mask).flatten() for name, mask in kept.items()])
    assert same.float().mean() > 0.999
    for name, weight in exported.state_dict().items():
        close = torch.isclose(plain.state_dict()[name], weight.float(), rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.999, name
    if trained != "weights":
        assert any(not torch.equal(mask, masks[name]) for name, mask in kept.items()), "no mask has moved"
