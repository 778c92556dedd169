"""A student and its teacher against transformers' models: SquareHead, divergence and cross-entropy, and the weights' gradients, in fp64.

Run as a program in two ranks, this file compares each rank's part under one layout after another: FOLDER.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM, PreTrainedModel

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import load_model, resolve
from maskllm.families.registry import parameter_map
from maskllm.masking.draw import Draw, open_draw
from maskllm.masking.sampler import MaskSampler
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.megatron.build import build_model
from maskllm.megatron.distillation import StudentAndTeacher
from maskllm.megatron.linears import attach_bits, masked_linears
from maskllm.megatron.loss import LossTerms
from maskllm.megatron.process_groups import parallel_processes
from maskllm.patterns import Pattern, pack_mask
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import Batch
from maskllm.training.micro_batches import MicroBatches, mean_losses
from maskllm.training.objective import Objective
from tests.families.tiny import write_tiny
from tests.training.layout_load_worker import own_part

MODELS = ["llama3", "gemma2", "qwen3"]
TERMS, SQUAREHEAD = LossTerms(0.4, 0.6, 2.0), 0.3
EACH_TERM = {
    "ce": (LossTerms(0.4), 0.0),
    "kl": (LossTerms(0.0, 0.6, 2.0), 0.0),
    "squarehead": (LossTerms(0.0), SQUAREHEAD),
    "all": (TERMS, SQUAREHEAD),
}
"""What is minimized -> the terms of the output's loss, and the weight of SquareHead."""
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
LAYOUTS = {"tp2": TP2, "tp2_sequence_parallel": TP2 | {"sequence_parallel": True}, "pp2": PP2}
RECOMPUTATION = {
    "kept": {},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]},
}


def mask_of(shape: torch.Size) -> torch.Tensor:
    """A 2:4 mask, bool [out, in]."""
    return Pattern(2, 4).candidates(device="cpu")[torch.arange(shape[0] * shape[1] // 4) % 6].view(shape).bool()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels, int64 [2, 40]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(96, (2, 40), generator=generator), torch.randint(96, (2, 40), generator=generator)


def layer_outputs(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The hidden states after each layer (not those of the final norm), and the logits."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output[0] if isinstance(output, tuple) else output))
        for layer in model.model.layers
    ]
    logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return outputs, logits


def by_transformers(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    terms: LossTerms = TERMS,
    squarehead_weight: float = SQUAREHEAD,
) -> dict:
    """The loss terms by arXiv 2310.06927, section 3, and the gradient of their weighted sum for each parameter."""
    student.zero_grad()
    ours, our_logits = layer_outputs(student, tokens)
    with torch.no_grad():
        theirs, their_logits = layer_outputs(teacher, tokens)
    squarehead = sum(F.mse_loss(f_s, f_t) / F.mse_loss(f_t, torch.zeros_like(f_t)) for f_s, f_t in zip(ours, theirs, strict=True))
    t = terms.temperature
    ours, theirs = ((logits / t).log_softmax(-1) for logits in (our_logits, their_logits))
    kl = t**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()
    ce = F.cross_entropy(our_logits.flatten(0, 1), labels.flatten())
    (terms.ce * ce + terms.kl * kl + squarehead_weight * squarehead).backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    return {"ce": ce.item(), "kl": kl.item(), "squarehead": squarehead.item(), "gradients": gradients}


@pytest.mark.parametrize("recomputation", RECOMPUTATION)
@pytest.mark.parametrize("own_weights", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_terms_and_gradients_are_those_of_transformers(name, own_weights, recomputation, tmp_path):
    """`own_weights`: the teacher is the student without its masks, as it is while weights are frozen."""
    teacher = write_tiny(name, tmp_path / "hf").double()
    student = write_tiny(name, tmp_path / "hf").double()
    tokens, labels = batch()
    convert(tmp_path / "hf", tmp_path / "dense")
    checkpoint = resolve(tmp_path / "dense")
    with parallel_processes():
        model = build_model(checkpoint.model_config, params_dtype=torch.float32, recomputation=RECOMPUTATION[recomputation])
        load_model(checkpoint, model)
        attach_bits(model)
        masks = {}
        for linear in masked_linears(model):
            mask = mask_of(linear.weight.shape)
            masks[linear.masked.location.name] = mask
            linear.mask_bits = pack_mask(mask)
            if not own_weights:
                linear.masked.write_zeros()
                linear.weight.requires_grad_()
        other = None
        if not own_weights:
            other = build_model(checkpoint.model_config, params_dtype=torch.float32).eval()
            load_model(checkpoint, other)
        for mapping in parameter_map(checkpoint.model_config):
            if mapping.linear is not None:
                for part, mask in zip(mapping.hf, mapping.split(masks[mapping.linear], checkpoint.model_config), strict=True):
                    student.get_parameter(part).data.mul_(mask)
        wanted = by_transformers(student, teacher, tokens, labels)

        pair = StudentAndTeacher(model, other, TERMS, SQUAREHEAD)
        pair.squarehead_terms = torch.zeros(())
        positions = torch.arange(40).expand_as(tokens)
        with open_draw(Draw(0)), torch.set_grad_enabled(not own_weights):
            losses = pair(tokens, positions, None, labels=labels)
        assert losses.cross_entropy.mean().item() == pytest.approx(wanted["ce"], rel=1e-5)
        assert losses.kl.mean().item() == pytest.approx(wanted["kl"], rel=1e-4)
        assert pair.squarehead_terms.item() == pytest.approx(wanted["squarehead"], rel=1e-5)
        if own_weights:
            return
        losses.mean.backward()
        config = checkpoint.model_config
        gradients = {linear.masked.location.name: linear.weight.grad for linear in masked_linears(model)}
        for mapping in parameter_map(config):
            if mapping.linear is not None:
                gradient, mask = gradients[mapping.linear], masks[mapping.linear]
                assert not gradient[~mask].any(), "a removed weight has a gradient"
                for part, found, kept in zip(mapping.hf, mapping.split(gradient, config), mapping.split(mask, config), strict=True):
                    expected = wanted["gradients"][part] * kept
                    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_each_term_has_the_gradients_of_transformers(tmp_path):
    compare_each_term(write_checkpoints(tmp_path), {})


@pytest.mark.slow
def test_two_ranks_have_their_parts_of_these_gradients(ranks, tmp_path):
    """Each term alone. Sequence parallelism splits the hidden states that SquareHead compares; a pipeline stage has its own layers."""
    ranks(2, "tests.megatron.test_distillation", write_checkpoints(tmp_path))


def write_checkpoints(folder: Path) -> Path:
    """A tiny model, FOLDER/hf, and its dense checkpoint, FOLDER/dense. Returns `folder`."""
    write_tiny("llama3", folder / "hf")
    convert(folder / "hf", folder / "dense")
    return folder


def compare_each_term(folder: Path, layout: dict[str, int]) -> None:
    """Compare a step of training under a layout with transformers' models: each term, and the gradients of this rank's weights.

    A step is two micro-batches, so that the first pipeline stage has done both forward passes before the first backward pass.
    """
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64) for _ in range(2))
    batches = [Batch(*(each[None] for each in (*pair, torch.arange(40)))) for pair in zip(*batch(), strict=True)]
    checkpoint = resolve(folder / "dense")
    config = checkpoint.model_config
    mappings = {mapping.linear: mapping for mapping in parameter_map(config) if mapping.linear is not None}
    masks = {name: mask_of(mapping.megatron_shape(config)) for name, mapping in mappings.items()}
    for name, mapping in mappings.items():
        for part, mask in zip(mapping.hf, mapping.split(masks[name], config), strict=True):
            student.get_parameter(part).data.mul_(mask)
    sizes = {name: size for name, size in layout.items() if name != "sequence_parallel"}
    arguments = TrainArguments(global_batch_size=2, micro_batch_size=1, seq_length=40, **layout)
    with parallel_processes(**sizes):
        split = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size())
        for minimized, (terms, squarehead) in EACH_TERM.items():
            wanted = [by_transformers(student, teacher, one.tokens, one.labels, terms, squarehead) for one in batches]
            model, other = (
                build_model(config, params_dtype=torch.float32, sequence_parallel=arguments.sequence_parallel) for _ in range(2)
            )
            for each in (model, other):
                load_model(checkpoint, each)
            attach_bits(model)
            for linear in masked_linears(model):
                linear.mask_bits = pack_mask(own_part(linear.masked.location.name, masks[linear.masked.location.name], *split))
                linear.masked.write_zeros()
                linear.weight.requires_grad_()
            pair = StudentAndTeacher(model, other.eval(), terms, squarehead)
            objective = Objective(AnnealingSchedule(1), MaskSampler(Pattern(2, 4)), terms.ce, pair)
            objective.set_step(0, len(batches))
            micro_batches = MicroBatches(arguments, pair, objective, lambda: None)
            found = mean_losses(micro_batches.run(batches, 0, sample_of=lambda index: index, forward_only=False).double())
            for term, value, weight in (
                ("ce", found.cross_entropy, 1.0), ("kl", found.kl, terms.kl), ("squarehead", found.squarehead, squarehead)
            ):  # fmt: skip
                if weight:
                    expected = sum(one[term] for one in wanted) / len(wanted)
                    assert value == pytest.approx(expected, rel=1e-4), (layout, minimized, term)
            for linear in masked_linears(model):
                mapping = mappings[linear.masked.location.name]
                parts = [sum(one["gradients"][part] for one in wanted) / len(wanted) for part in mapping.hf]
                whole = mapping.to_megatron(parts, config) * masks[mapping.linear]
                torch.testing.assert_close(
                    linear.weight.grad.double(),
                    own_part(mapping.linear, whole, *split),
                    rtol=1e-3,
                    atol=1e-5 * float(whole.abs().max()),
                    msg=lambda text, where=(layout, minimized, mapping.linear): f"{where}: {text}",
                )


if __name__ == "__main__":
    for each_layout in LAYOUTS.values():
        compare_each_term(Path(sys.argv[1]), each_layout)
