"""A student and its teacher against transformers' models: SquareHead, divergence and cross-entropy, and the weights' gradients, in fp64.

Run as a program in two tensor-parallel ranks, this file compares each rank's part: FOLDER.
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
from maskllm.megatron.build import build_model
from maskllm.megatron.distillation import StudentAndTeacher
from maskllm.megatron.linears import attach_bits, masked_linears
from maskllm.megatron.loss import LossTerms
from maskllm.megatron.process_groups import parallel_processes
from maskllm.patterns import Pattern, pack_mask
from tests.families.tiny import write_tiny
from tests.training.layout_load_worker import own_part

MODELS = ["llama3", "gemma2", "qwen3"]
TERMS, SQUAREHEAD = LossTerms(0.4, 0.6, 2.0), 0.3
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


def by_transformers(student: PreTrainedModel, teacher: PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor) -> dict:
    """The loss terms by arXiv 2310.06927, section 3, and the gradient of their weighted sum for each parameter."""
    ours, our_logits = layer_outputs(student, tokens)
    with torch.no_grad():
        theirs, their_logits = layer_outputs(teacher, tokens)
    squarehead = sum(F.mse_loss(f_s, f_t) / F.mse_loss(f_t, torch.zeros_like(f_t)) for f_s, f_t in zip(ours, theirs, strict=True))
    t = TERMS.temperature
    ours, theirs = ((logits / t).log_softmax(-1) for logits in (our_logits, their_logits))
    kl = t**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()
    ce = F.cross_entropy(our_logits.flatten(0, 1), labels.flatten())
    (TERMS.ce * ce + TERMS.kl * kl + SQUAREHEAD * squarehead).backward()
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


@pytest.mark.slow
def test_two_ranks_have_their_parts_of_these_gradients(ranks, tmp_path):
    """Tensor parallel, and with sequence parallelism too, which splits the hidden states that SquareHead compares."""
    write_tiny("llama3", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    ranks(2, "tests.megatron.test_distillation", tmp_path)


def _rank_main(folder: Path) -> None:
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float64) for _ in range(2))
    tokens, labels = batch()
    checkpoint = resolve(folder / "dense")
    config = checkpoint.model_config
    mappings = {mapping.linear: mapping for mapping in parameter_map(config) if mapping.linear is not None}
    masks = {name: mask_of(mapping.megatron_shape(config)) for name, mapping in mappings.items()}
    for name, mapping in mappings.items():
        for part, mask in zip(mapping.hf, mapping.split(masks[name], config), strict=True):
            student.get_parameter(part).data.mul_(mask)
    wanted = by_transformers(student, teacher, tokens, labels)
    for sequence_parallel in (False, True):
        with parallel_processes(tensor_model_parallel_size=2):
            model, other = (build_model(config, params_dtype=torch.float32, sequence_parallel=sequence_parallel) for _ in range(2))
            rank = parallel_state.get_tensor_model_parallel_rank()
            for each in (model, other):
                load_model(checkpoint, each)
            attach_bits(model)
            for linear in masked_linears(model):
                linear.mask_bits = pack_mask(own_part(linear.masked.location.name, masks[linear.masked.location.name], rank, 2))
                linear.masked.write_zeros()
                linear.weight.requires_grad_()
            pair = StudentAndTeacher(model, other.eval(), TERMS, SQUAREHEAD)
            pair.squarehead_terms = torch.zeros(())
            with open_draw(Draw(0)):
                losses = pair(tokens, torch.arange(40).expand_as(tokens), None, labels=labels)
            for found, term in (
                (losses.cross_entropy.mean(), "ce"), (losses.kl.mean(), "kl"), (pair.squarehead_terms, "squarehead")
            ):  # fmt: skip
                assert found.item() == pytest.approx(wanted[term], rel=1e-4), term
            losses.mean.backward()
            for linear in masked_linears(model):
                mapping = mappings[linear.masked.location.name]
                whole = mapping.to_megatron([wanted["gradients"][part] for part in mapping.hf], config) * masks[mapping.linear]
                expected = own_part(mapping.linear, whole, rank, 2)
                torch.testing.assert_close(
                    linear.weight.grad.double(), expected, rtol=1e-3, atol=1e-5 * float(whole.abs().max()), msg=mapping.linear
                )


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]))
