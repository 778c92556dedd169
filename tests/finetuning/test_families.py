"""Every family through the whole way: prune, sparsify, train, finish, save, and load with plain transformers."""

from __future__ import annotations

import copy

import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.finetuning import SparseTrainer, SparseTrainingArguments
from maskllm.huggingface import finish, sparsify
from maskllm.huggingface.blocks import as_matrix, block_linears
from maskllm.pruning import PruneSettings, prune_hf
from tests.finetuning.tiny import CONFIGS, batches, samples, tiny_model

FUSED = ("mixtral",)
"""Families whose experts are fused in one tensor, so that no linear holds them."""
LINEARS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text"), 14),
    **dict.fromkeys(("phi3", "gpt2", "gpt_neox", "falcon", "bloom", "mpt"), 8),
    **dict.fromkeys(("opt", "vit"), 12),
    **dict.fromkeys(("t5", "mt5"), 2 * (4 + 3) + 2 * (8 + 3)),
    **dict.fromkeys(("bart", "marian", "whisper"), 2 * (4 + 2) + 2 * (8 + 2)),
}
"""Linears of two blocks, of the encoder and of the decoder."""


def arguments(folder, **changes) -> SparseTrainingArguments:
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    return SparseTrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **(settings | changes))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in FUSED])
def test_a_trained_model_is_loaded_by_plain_transformers(name, tmp_path):
    model, data = tiny_model(name), samples(name, 8)
    teacher = copy.deepcopy(model)
    others = {key: value.clone() for key, value in model.state_dict().items()}
    pruned = prune_hf(copy.deepcopy(model), batches(samples(name, 2, padded=False)), PruneSettings("wanda"))
    sparsify(model, "2:4", train="both", masks=pruned.unpacked(model))
    trainer = SparseTrainer(
        model,
        arguments(tmp_path, kl_loss_coeff=1.0, squarehead_loss_coeff=1.0, weights_learning_rate=1e-3),
        train_dataset=data,
        teacher=teacher,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line in lines:
        total = line["cross_entropy"] + line["kl"] + line["squarehead"]
        assert line["loss"] == pytest.approx(total, rel=1e-4) and line["kl"] > 0 and line["squarehead"] > 0
    plain, masks = trainer.finish()
    assert plain is model and len(masks) == LINEARS[name]
    assert {key: value.shape for key, value in plain.state_dict().items()} == {key: value.shape for key, value in others.items()}
    moved = {key for key, value in plain.state_dict().items() if not torch.equal(value, others[key])}
    assert set(masks) <= moved
    for linear_name, linear in block_linears(plain).items():
        mask, weight = masks.pop(f"{linear_name}.weight"), linear.weight.data
        assert type(linear) is type(teacher.get_submodule(linear_name))
        assert torch.equal(weight == 0, ~mask), linear_name
        assert (as_matrix(linear, mask).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert not masks

    plain.eval().save_pretrained(tmp_path / "plain")
    loaded, report = type(plain).from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        (batch,) = batches(data[:1])
        assert torch.equal(loaded(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("name", FUSED)
def test_a_family_with_fused_experts_is_refused_but_for_its_linears(name):
    with pytest.raises(MaskLLMError, match=r"model\.layers\.0\.mlp\.experts\.\w+ is .* mixture of experts is not supported"):
        sparsify(tiny_model(name), "2:4")
    model = tiny_model(name)
    found = sparsify(model, "2:4", modules=["q_proj", "o_proj"])
    assert sorted(found) == [f"model.layers.{layer}.self_attn.{linear}" for layer in (0, 1) for linear in ("o_proj", "q_proj")]
    assert sorted(finish(model)[1]) == sorted(f"{linear}.weight" for linear in found)
