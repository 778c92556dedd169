"""The planned memory against the tensors that autograd keeps, the tensors of a model, and the peak memory of processes."""

from __future__ import annotations

import json

import pytest
import torch
from megatron.core import parallel_state
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.plan_memory import make_inputs, measure
from maskllm.masking import parameter as masked_parameter
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron import loss
from maskllm.megatron.build import build_model
from maskllm.megatron.gpt import MaskedGPTModel
from maskllm.megatron.linears import attach_bits, attach_logits, attach_scales, masked_linears, masked_parameters
from maskllm.megatron.process_groups import parallel_processes
from maskllm.ops import masked_weight
from maskllm.patterns import Pattern
from maskllm.planning import memory as planning
from maskllm.planning.memory import Layout, Shapes, activations, stage_memory
from maskllm.planning.models import config_of
from maskllm.training.arguments import TrainArguments
from maskllm.training.data_parallel import data_parallel
from maskllm.training.optimizer import build_optimizer
from maskllm.training.trainables import parameter_groups
from tests.planning.saved import kept

SIZES = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    **SIZES,
}
NEMOTRON = LLAMA | {"model_type": "nemotron", "tie_word_embeddings": False}
GPT = {"model_type": "gpt2", "vocab_size": 256, "n_embd": 192, "n_layer": 4, "n_head": 6, "n_positions": 512, "dtype": "bfloat16"}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 32}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 50}
GEMMA2 = LLAMA | {"model_type": "gemma2", "head_dim": 32, "sliding_window": 50}
SELECTIVE = {"recompute_granularity": "selective"}
TEACHER = {"kl_loss_coeff": 1.0, "squarehead_loss_coeff": 0.1}
CAST = {"train": "weights", "weights_optimizer": "cast"}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}

CASES = {
    "llama": (LLAMA, {}),
    "llama_fp32": (LLAMA, {"params_dtype": "fp32", "micro_batch_size": 1}),
    "nemotron": (NEMOTRON, {}),
    "gpt": (GPT, {}),
    "qwen3": (QWEN3, {}),
    "qwen3_fp32": (QWEN3, {"params_dtype": "fp32"}),
    "mistral": (MISTRAL, {}),
    "gemma2": (GEMMA2, {}),
    "gemma2_without_caps": (GEMMA2 | {"attn_logit_softcapping": None}, {}),
    "core_attn": (LLAMA, SELECTIVE),
    "mlp": (LLAMA, SELECTIVE | {"recompute_modules": ["mlp"]}),
    "uniform": (LLAMA, FULL | {"recompute_method": "uniform"}),
    "block": (LLAMA, FULL | {"recompute_method": "block"}),
    "weights": (LLAMA, {"train": "weights"}),
    "weights_fp32": (LLAMA, {"train": "weights", "params_dtype": "fp32"}),
    "weights_embeddings": (LLAMA, {"train": "weights", "train_embeddings": True}),
    "weights_embeddings_untied": (NEMOTRON, {"train": "weights", "train_embeddings": True} | TEACHER),
    "weights_gpt": (GPT, {"train": "weights"} | TEACHER),
    "weights_qwen3": (QWEN3, {"train": "weights"} | TEACHER),
    "weights_gemma2": (GEMMA2, {"train": "weights"} | TEACHER),
    "weights_mlp": (LLAMA, {"train": "weights"} | TEACHER | SELECTIVE | {"recompute_modules": ["mlp"]}),
    "weights_uniform": (LLAMA, {"train": "weights"} | TEACHER | FULL | {"recompute_method": "uniform"}),
    "cast": (LLAMA, CAST | TEACHER),
    "cast_fp32": (LLAMA, CAST | {"params_dtype": "fp32"}),
    "cast_uniform": (LLAMA, CAST | FULL | {"recompute_method": "uniform"}),
    "both": (LLAMA, {"train": "both"} | TEACHER),
    "both_fp32": (LLAMA, {"train": "both", "params_dtype": "fp32"} | TEACHER),
    "both_uniform": (LLAMA, {"train": "both"} | TEACHER | FULL | {"recompute_method": "uniform"}),
    "both_block": (LLAMA, {"train": "both"} | TEACHER | FULL | {"recompute_method": "block"}),
    "masks_with_themselves": (LLAMA, TEACHER),
    "masks_with_themselves_uniform": (LLAMA, TEACHER | FULL | {"recompute_method": "uniform"}),
    "masks_with_a_teacher": (NEMOTRON, TEACHER | {"teacher": "a checkpoint"}),
    "kl_alone": (LLAMA, {"train": "both", "kl_loss_coeff": 1.0}),
}


def compare(found: list[tuple[str, int]], model: dict, arguments: TrainArguments, layout: Layout) -> None:
    """Check the (kind, bytes) that `kept` found against the plan of the first stage."""
    planned = activations(config_of(model), arguments, layout, 0, device="cpu")
    masked = sum(size for kind, size in found if kind == "masked")
    others = sum(size for kind, size in found if kind != "masked")
    assert masked == planned.masked_weights
    assert others == pytest.approx(planned.activations, rel=0.02), found


@pytest.mark.parametrize("name", CASES)
def test_planned_activations_match_what_autograd_keeps(name):
    model, settings = CASES[name]
    arguments = TrainArguments(**{"micro_batch_size": 2, "seq_length": 128, **settings})
    with parallel_processes():
        found = kept(config_of(model), arguments)
    compare(found, model, arguments, Layout(1, 1, 1))


@pytest.mark.parametrize("recomputed", [False, True])
def test_recomputed_masked_weights_are_not_kept(recomputed, monkeypatch):
    drawn = []

    def draw(*args, **kwargs):
        masked = masked_weight(*args, **kwargs)
        drawn.append(StorageWeakRef(masked.untyped_storage()))
        return masked

    monkeypatch.setattr(masked_parameter, "masked_weight", draw)
    alive = []

    def count(losses: torch.Tensor) -> torch.Tensor:
        alive.append(sum(not storage.expired() for storage in drawn))
        return losses

    monkeypatch.setattr(MaskedGPTModel, "forward", _then(MaskedGPTModel.forward, count))
    arguments = TrainArguments(seq_length=16, **SELECTIVE, recompute_modules=["masked_weight"] if recomputed else ["core_attn"])
    with parallel_processes():
        kept(config_of(LLAMA), arguments)
    assert alive == [0 if recomputed else 4 * 4]
    assert len(drawn) == (2 if recomputed else 1) * 4 * 4


def _then(forward, after):
    return lambda *args, **kwargs: after(forward(*args, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{}, {"sequence_parallel": True}, {"sequence_parallel": True, "train": "both"} | TEACHER],
    ids=["tensor", "sequence", "teacher"],
)
def test_planned_activations_of_a_tensor_parallel_rank(more, ranks, tmp_path):
    settings = {"micro_batch_size": 2, "seq_length": 128, **more}
    ranks(2, "tests.planning.saved", tmp_path / "found.json", 2, json.dumps(LLAMA), json.dumps(settings))
    compare(json.loads((tmp_path / "found.json").read_text()), LLAMA, TrainArguments(**settings), Layout(2, 1, 1))


@pytest.mark.parametrize("model", [LLAMA, NEMOTRON, GPT, QWEN3, GEMMA2], ids=lambda model: model["model_type"])
def test_planned_weights_match_a_built_model(model):
    config = config_of(model)
    with parallel_processes():
        built = build_model(config, params_dtype=torch.bfloat16)
        weights = sum(layer.weight.numel() for layer in masked_linears(built))
        everything = sum(parameter.numel() for parameter in built.parameters())
    shapes = Shapes(config, 1)
    assert shapes.stage(0, 1) == (weights, everything - weights)
    memory = stage_memory(config, TrainArguments(seq_length=128), Layout(1, 1, 1), 0, device="cpu")
    assert memory.weights == 2 * everything
    # The host also keeps the weights in the stored dtype if that is not the compute dtype.
    for dtype, copy in (("float32", 0), ("bfloat16", 2), ("float16", 2)):
        stored = config_of(model | {"dtype": dtype})
        in_fp32 = stage_memory(stored, TrainArguments(seq_length=128, params_dtype="fp32"), Layout(1, 1, 1), 0, device="cpu")
        assert in_fp32.weights == (4 + copy) * everything
    assert memory.mask_logits == memory.gradients == memory.optimizer_state / 2 == 4 * weights * 6 / 4


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("params_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("trained", ["masks", "weights", "both", "embeddings", "cast"])
def test_planned_training_state_matches_a_built_optimizer(trained, params_dtype, distributed):
    what = {"embeddings": {"train": "weights", "train_embeddings": True}, "cast": CAST}.get(trained, {"train": trained})
    arguments = TrainArguments(params_dtype=params_dtype, use_distributed_optimizer=distributed, seq_length=128, **what)
    config = config_of(GPT | {"n_layer": 1})
    with parallel_processes():
        built = build_model(config, params_dtype=arguments.dtype)
        if arguments.uses_cast:
            attach_scales(built, MaskSampler(Pattern.parse(arguments.pattern)))
        else:
            attach_bits(built)
        if arguments.trains_masks:
            attach_logits(built, MaskSampler(Pattern.parse(arguments.pattern)))
        masked = masked_parameters(built)
        groups = parameter_groups(arguments, built, masked)
        model = data_parallel(arguments, built)
        (optimizer,) = getattr(whole := build_optimizer(arguments, groups, masked, model), "chained_optimizers", [whole])
        optimizer.step()
        own = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
        updated = [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
        masters = sum(parameter.nbytes for parameter in updated if parameter.untyped_storage().data_ptr() not in own)
        moments = sum(
            optimizer.optimizer.state[parameter][name].nbytes for parameter in updated for name in ("exp_avg", "exp_avg_sq")
        )
        gradients = sum(buffer.grad_data.nbytes for buffer in model.buffers)
        logits = sum(parameter.logits.nbytes for parameter in masked if arguments.trains_masks)
    memory = stage_memory(config, arguments, Layout(1, 1, 1), 0, device="cpu")
    assert (memory.masters, memory.optimizer_state, memory.mask_logits) == (masters, moments, logits)
    assert memory.gradients == pytest.approx(gradients, rel=1e-3)  # the distributed optimizer pads its buffers


class _Alive(TorchDispatchMode):
    """The largest number of bytes of the tensors that operators in the block have made and that are alive after one of them."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, tuple | list) else [results]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                storage = tensor.untyped_storage()
                self.made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        del tensor
        self.made = {place: one for place, one in self.made.items() if not one[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return results


@pytest.mark.parametrize("settings", [{}, {"kl_loss_coeff": 1.0}, {"kl_loss_coeff": 1.0, "kl_temperature": 2.0}], ids=str)
@pytest.mark.parametrize("params_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_planned_memory_of_the_loss_matches_its_tensors(settings, params_dtype, embeddings, monkeypatch):
    for module in (loss, planning):
        monkeypatch.setattr(module, "MAX_CHUNK_LOGITS", 1 << 16)
    what = {"train": "weights", "train_embeddings": True} if embeddings else {"train": "both"}
    arguments = TrainArguments(params_dtype=params_dtype, seq_length=512, **what, **settings)
    config = config_of(LLAMA | {"vocab_size": 1024, "hidden_size": 96, "num_attention_heads": 6})
    hidden, weight, theirs, their_weight = (torch.randn(rows, 96).to(arguments.dtype) for rows in (512, 1024, 512, 1024))
    labels = torch.randint(1024, (512,))
    terms = loss.LossTerms(kl=arguments.kl_loss_coeff, temperature=arguments.kl_temperature)
    with parallel_processes(), _Alive([hidden, weight, theirs, their_weight, labels]) as alive:
        group = parallel_state.get_tensor_model_parallel_group()
        teacher = (theirs, their_weight) if settings else None
        loss.linear_losses(
            hidden.requires_grad_(), weight.requires_grad_(embeddings), labels, group, 1024, terms=terms, teacher=teacher
        )
    kept = hidden.nbytes + (4 * weight.numel() if embeddings else 0)
    planned = planning.loss_temporary(config, arguments, Layout(1, 1, 1), device="cuda")
    assert alive.most - kept == pytest.approx(planned, rel=0.1)


def test_pipeline_stages_together_hold_the_model_once_and_tied_embeddings_twice():
    for model in (LLAMA, NEMOTRON):
        shapes = Shapes(config_of(model), 1)
        whole = [sum(values) for values in zip(*(shapes.stage(stage, 2) for stage in range(2)), strict=True)]
        twice = 256 * 192 if model["tie_word_embeddings"] else 0
        assert whole == pytest.approx([shapes.stage(0, 1)[0], shapes.stage(0, 1)[1] + twice])


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs",
    [["pipeline", "sequence"], ["weights", "weights-and-masks"], pytest.param(["low-precision"], marks=pytest.mark.long)],
    ids=lambda runs: "+".join(runs),
)
def test_runs_peak_within_a_tenth_of_the_plan(runs, ranks, tmp_path):
    """Peak resident memory of real runs, as `benchmarks/plan_memory.py` measures it for larger models."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 256, **heads}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    checkpoints, data = make_inputs(tmp_path / "hf", tmp_path)
    for run, row in measure(runs, checkpoints, data, tmp_path, start=ranks).items():
        assert row["measured"] == pytest.approx(row["planned"], rel=0.1), run
