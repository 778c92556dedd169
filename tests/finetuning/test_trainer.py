"""`SparseTrainer`: what it minimizes, which masks it draws, and that it continues exactly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainerCallback,
)

from maskllm.errors import MaskLLMError
from maskllm.finetuning import SparseTrainer
from maskllm.finetuning.hidden_states import Blocks
from maskllm.huggingface import sparsify
from maskllm.huggingface.sparse_model import masked_parameters
from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, prune_hf
from tests.finetuning.tiny import TOKENS, batches, samples, tiny_model
from tests.finetuning.worker import lines, results, trainer


def first_line(run: SparseTrainer) -> dict[str, float]:
    """What a run logs of its first step."""
    run.train()
    return lines(run)[0]


@pytest.mark.parametrize("model", ["gpt2", "t5", "whisper"])
def test_padding_counts_nowhere(model, tmp_path):
    """The same samples with more padding have the same terms."""
    found = []
    for more in (0, 4):
        run = trainer(tmp_path, model=model, train="weights", steps=1, dataloader_drop_last=True)
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        run.train_dataset = [
            {
                name: torch.nn.functional.pad(tensor, (0, more), value=padding[name]) if name in padding else tensor
                for name, tensor in sample.items()
            }
            for sample in run.train_dataset
        ]
        found.append(first_line(run))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["squarehead"] > 0 and found[0]["kl"] > 0


@pytest.mark.parametrize("model", ["gpt2", "t5", "refuses"])
def test_accumulated_batches_are_one_batch(model, tmp_path, monkeypatch):
    """Samples have different numbers of labels, so the mean of their means is another loss. T5's own loss ignores what Trainer tells it,
    and some models say that theirs does, such as Qwen2.5-VL and Gemma 3n."""
    if model == "refuses":
        monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
        model = "llama"
    found = []
    for batch, accumulated in ((4, 1), (2, 2), (1, 4)):
        run = trainer(
            tmp_path,
            model=model,
            train="weights",
            steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            squarehead_loss_coeff=0.0,
        )
        found.append(first_line(run))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


@pytest.mark.parametrize("model", ["llama", "t5", "gpt2"])
def test_the_terms_are_those_of_their_formulas(model, tmp_path):
    """Against plain torch on the hidden states and logits of the two models, for one batch without padding."""
    run = trainer(tmp_path, model=model, train="weights", steps=1, gradient_accumulation_steps=1, kl_temperature=2.0)
    run.train_dataset = samples(model, 1, padded=False) * 2
    student, teacher = copy.deepcopy(run.model).eval(), run.teacher
    found = first_line(run)
    (batch,) = batches(run.train_dataset[:1])
    outputs = []
    for each in (student, teacher):
        states = []
        stacks = {"t5": ("encoder.block", "decoder.block"), "llama": ("model.layers",), "gpt2": ("transformer.h",)}[model]
        for block in (block for stack in stacks for block in each.get_submodule(stack)):
            block.register_forward_hook(
                lambda _b, _i, output, states=states: states.append(output[0] if isinstance(output, tuple) else output)
            )
        with torch.no_grad():
            outputs.append((each(**batch), states))
    (ours, our_states), (theirs, their_states) = outputs
    assert found["cross_entropy"] == pytest.approx(float(ours.loss), rel=1e-5)
    terms = [(s - t).square().sum() / t.square().sum() for s, t in zip(our_states, their_states, strict=True)]
    assert len(terms) == (4 if model == "t5" else 2)
    assert found["squarehead"] == pytest.approx(float(sum(terms)), rel=1e-5)
    logits = [each.logits if model == "t5" else each.logits[:, :-1] for each in (ours, theirs)]
    p, q = (torch.log_softmax(each / 2.0, -1) for each in logits)
    kl = 4 * (q.exp() * (q - p)).sum(-1).mean()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert found["loss"] == pytest.approx(found["cross_entropy"] + found["kl"] + 0.5 * found["squarehead"], rel=1e-6)


@pytest.mark.parametrize(
    ("model", "train", "step"),
    [("llama", "masks", 3), ("t5", "both", 3), ("vit", "weights", 3), ("llama", "masks", 6), ("t5", "both", 6)],
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(model, train, step, tmp_path):
    """Resumed from the middle and from the last step, after which nothing is trained; the rate is not 0 then."""
    options = {
        "model": model,
        "train": train,
        "steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "constant",
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    expected = results(whole)
    resumed = trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    found = results(resumed)
    assert found["lines"][step:] == expected["lines"][step:]
    for kind in ("tensors", "masks"):
        assert all(torch.equal(found[kind][name], tensor) for name, tensor in expected[kind].items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_masks(reentrant, tmp_path):
    plain = trainer(tmp_path, steps=2)
    plain.train()
    again = trainer(tmp_path, steps=2, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": reentrant})
    again.train()
    if reentrant:  # adds up the two gradients of a hidden state in the other order
        for ours, theirs in zip(lines(again), lines(plain), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
    else:
        assert lines(again) == lines(plain)
        for name, parameter in masked_parameters(plain.model).items():
            assert torch.equal(masked_parameters(again.model)[name].logits, parameter.logits)


class _Zeros(TrainerCallback):
    """Counts the steps after which each weight is zero wherever its mask is."""

    steps = 0

    def on_step_end(self, *_, model, **__):
        for parameter in masked_parameters(model).values():
            assert not parameter.weight[~parameter.fixed_mask()].any()
        self.steps += 1


class _Mixing(torch.optim.SGD):
    """An optimizer whose step of an entry depends on other entries."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad += parameter.grad.mean()
        return super().step(closure)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "mixing"])
def test_zeros_stay_exact_after_every_step(optimizer, tmp_path):
    changes = {} if optimizer == "mixing" else {"optim": optimizer}
    run = trainer(tmp_path, train="weights", weight_decay=0.1, **changes)
    if optimizer == "mixing":
        run.optimizer = _Mixing(run.model.parameters(), lr=0.1)
    before = {name: parameter.weight.clone() for name, parameter in masked_parameters(run.model).items()}
    zeros = _Zeros()
    run.add_callback(zeros)
    run.train()
    assert zeros.steps == 4
    assert all(not torch.equal(parameter.weight, before[name]) for name, parameter in masked_parameters(run.model).items())


def test_an_evaluation_is_that_of_the_finished_model(tmp_path):
    run = trainer(tmp_path, steps=1)
    run.train()
    data = samples("llama", 4)
    loss = run.evaluate(data)["eval_loss"]
    plain, _ = run.finish()
    (expected,) = {run.__class__.__mro__[1](plain, run.args, eval_dataset=data).evaluate()["eval_loss"]}
    assert loss == pytest.approx(expected, rel=1e-6)


def test_a_model_that_was_trained_in_bf16_is_plain_again(tmp_path):
    """A next rung prunes it."""
    run = trainer(tmp_path, model="t5", train="weights", steps=1, bf16=True)
    run.train()
    plain, _ = run.finish()
    fresh = tiny_model("t5")
    fresh.load_state_dict(plain.state_dict())
    batch = batches(samples("t5", 2))[0]
    with torch.inference_mode():
        assert torch.equal(plain.eval()(**batch).logits, fresh.eval()(**batch).logits)
    prune_hf(plain, batches(samples("t5", 2, padded=False)), PruneSettings("sparsegpt", Pattern(1, 4), zeros_stay=True))


def test_masks_and_weights_have_their_own_rates(tmp_path):
    run = trainer(tmp_path, train="both", weight_decay=0.1, weights_weight_decay=0.01)
    optimizer = run.create_optimizer()
    logits = {id(parameter.logits) for parameter in masked_parameters(run.model).values()}
    found = [
        ({id(each) in logits for each in group["params"]}, group["lr"], group["weight_decay"]) for group in optimizer.param_groups
    ]
    assert found == [({True}, 1e-2, 0.1), ({False}, 1e-3, 0.01), ({False}, 1e-3, 0.0)]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(run.model.parameters()))


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_a_batch_without_labels_adds_nothing(model, tmp_path):
    run = trainer(tmp_path, model=model, train="weights", steps=1)
    ignored = {**run.train_dataset[0], "labels": torch.full((TOKENS,), -100)}
    run.train_dataset = [ignored, run.train_dataset[0]]
    line = first_line(run)
    assert line["cross_entropy"] > 0 and all(math.isfinite(value) for value in line.values())
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_logits_and_weights_are_clipped_each_by_its_own_norm(tmp_path):
    """The gradients that the optimizer gets, against those of a run that clips nothing."""
    found = {}
    for largest in (0.5, 1e9):
        run = trainer(tmp_path, train="both", steps=1, max_grad_norm=largest)
        gradients = found[largest] = {}

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, *_, model, gradients=gradients, **__):
                gradients.update({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})

        run.add_callback(Look())
        line = {**first_line(run), **run.state.log_history[0]}
    clipped, whole = found.values()
    for key, kind in (("grad_norm", True), ("weights_grad_norm", False)):
        names = [name for name in whole if name.endswith("mask_logits") == kind]
        norm = torch.cat([whole[name].flatten() for name in names]).norm()
        assert line[key] == pytest.approx(float(norm), rel=1e-5)
        assert norm > 0.5, "nothing to clip"
        for name in names:
            torch.testing.assert_close(clipped[name], whole[name] * (0.5 / norm), rtol=1e-4, atol=1e-8)


def test_a_mask_of_text_leaves_the_states_of_a_tower_alone():
    """LLaVA with 4 patches and texts of 8 tokens, of which the first ones are padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        text_config=LlamaConfig(**sizes, vocab_size=16),
    )
    blocks = Blocks(LlavaForConditionalGeneration(config))
    tower, text = blocks.modules
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    ours, theirs = ({tower: [torch.randn(2, 4, 16)], text: [torch.randn(2, 8, 16)]} for _ in range(2))
    expected = 0.0
    for name, counted in ((tower, slice(None)), (text, slice(3, None))):
        student, teacher = ours[name][0][:, counted], theirs[name][0][:, counted]
        expected += float((student - teacher).square().sum() / teacher.square().sum())
    assert float(blocks.squarehead(ours, theirs, {"attention_mask": mask})) == pytest.approx(expected, rel=1e-6)


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(MaskLLMError, match="has no masks"):
        SparseTrainer(tiny_model("llama"), trainer(tmp_path).args)
    with pytest.raises(MaskLLMError, match="teacher: none, but"):
        model = tiny_model("llama")
        sparsify(model, "2:4", train="both")
        SparseTrainer(model, trainer(tmp_path).args)
    with pytest.raises(MaskLLMError, match="teacher: has masks itself; wanted a dense model"):
        SparseTrainer(model, trainer(tmp_path).args, teacher=model)
    with pytest.raises(MaskLLMError, match="teacher: no term"):
        trainer(tmp_path, train="both", kl_loss_coeff=0.0, squarehead_loss_coeff=0.0)
    with pytest.raises(MaskLLMError, match="nothing is minimized"):
        trainer(tmp_path, ce_loss_coeff=0.0, kl_loss_coeff=0.0, squarehead_loss_coeff=0.0)
    with pytest.raises(MaskLLMError, match="kl_temperature: found 0, wanted a positive number"):
        trainer(tmp_path, kl_temperature=0)
    run = trainer(tmp_path, train="weights", steps=1)
    run.teacher = tiny_model("llama", hidden_size=24, num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(MaskLLMError, match=r"teacher: after model\.layers\.0 it has \[1, 10, 24\], the student \[1, 10, 16\]"):
        run.train()
