"""The planned memory against what autograd keeps, against the tensors a model has, and against a process's peak."""

from __future__ import annotations

import json

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.plan_memory import peak
from maskllm.checkpoints.convert import convert
from maskllm.masking import parameter as masked_parameter
from maskllm.megatron.build import build_model
from maskllm.megatron.gpt import FrozenVocabularyGPTModel
from maskllm.megatron.linears import masked_linears
from maskllm.megatron.process_groups import parallel_processes
from maskllm.ops import masked_weight
from maskllm.planning.memory import Layout, Shapes, activations, stage_memory
from maskllm.planning.models import config_of
from maskllm.training.arguments import TrainArguments
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
SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full", "recompute_num_layers": 2}

CASES = {
    "llama": (LLAMA, {}),
    "llama_fp32": (LLAMA, {"params_dtype": "fp32", "micro_batch_size": 1}),
    "nemotron": (NEMOTRON, {}),
    "gpt": (GPT, {}),
    "core_attn": (LLAMA, SELECTIVE),
    "mlp": (LLAMA, SELECTIVE | {"recompute_modules": ["mlp"]}),
    "uniform": (LLAMA, FULL | {"recompute_method": "uniform"}),
    "block": (LLAMA, FULL | {"recompute_method": "block"}),
}


def compare(found: list[tuple[str, int]], model: dict, arguments: TrainArguments, layout: Layout) -> None:
    planned = activations(config_of(model), arguments, layout, 0, device="cpu")
    masked = sum(size for kind, size in found if kind == "masked")
    others = sum(size for kind, size in found if kind != "masked")
    assert masked == planned.masked_weights
    assert others == pytest.approx(planned.activations, rel=0.02), found


@pytest.mark.parametrize("name", CASES)
def test_planned_activations_are_those_that_autograd_keeps(name):
    model, settings = CASES[name]
    arguments = TrainArguments(**{"micro_batch_size": 2, "seq_length": 128, **settings})
    with parallel_processes():
        found = kept(config_of(model), arguments)
    compare(found, model, arguments, Layout(1, 1, 1))


@pytest.mark.parametrize("recomputed", [False, True])
def test_masked_weights_that_are_drawn_again_are_not_kept(recomputed, monkeypatch):
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

    monkeypatch.setattr(FrozenVocabularyGPTModel, "forward", _then(FrozenVocabularyGPTModel.forward, count))
    arguments = TrainArguments(seq_length=16, **SELECTIVE, recompute_modules=["masked_weight"] if recomputed else ["core_attn"])
    with parallel_processes():
        kept(config_of(LLAMA), arguments)
    assert alive == [0 if recomputed else 4 * 4]
    assert len(drawn) == (2 if recomputed else 1) * 4 * 4


def _then(forward, after):
    return lambda *args, **kwargs: after(forward(*args, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_planned_activations_of_a_tensor_parallel_rank(sequence_parallel, ranks, tmp_path):
    settings = {"micro_batch_size": 2, "seq_length": 128, "sequence_parallel": sequence_parallel}
    ranks(2, "tests.planning.saved", tmp_path / "found.json", 2, json.dumps(LLAMA), json.dumps(settings))
    compare(json.loads((tmp_path / "found.json").read_text()), LLAMA, TrainArguments(**settings), Layout(2, 1, 1))


@pytest.mark.parametrize("model", [LLAMA, NEMOTRON, GPT], ids=lambda model: model["model_type"])
def test_planned_weights_are_the_models(model):
    config = config_of(model)
    with parallel_processes():
        built = build_model(config, params_dtype=torch.bfloat16)
        weights = sum(layer.weight.numel() for layer in masked_linears(built))
        everything = sum(parameter.numel() for parameter in built.parameters())
    shapes = Shapes(config, 1)
    assert shapes.stage(0, 1) == (weights, everything - weights)
    memory = stage_memory(config, TrainArguments(seq_length=128), Layout(1, 1, 1), 0, device="cpu")
    assert memory.weights == 2 * everything
    # On the host there is a copy of what is not stored as it is computed with.
    for dtype, copy in (("float32", 0), ("bfloat16", 2), ("float16", 2)):
        stored = config_of(model | {"dtype": dtype})
        in_fp32 = stage_memory(stored, TrainArguments(seq_length=128, params_dtype="fp32"), Layout(1, 1, 1), 0, device="cpu")
        assert in_fp32.weights == (4 + copy) * everything
    assert memory.mask_logits == memory.gradients == memory.optimizer_state / 2 == 4 * weights * 6 / 4


def test_pipeline_stages_hold_the_model_once_but_for_tied_embeddings():
    for model in (LLAMA, NEMOTRON):
        shapes = Shapes(config_of(model), 1)
        whole = [sum(values) for values in zip(*(shapes.stage(stage, 2) for stage in range(2)), strict=True)]
        twice = 256 * 192 if model["tie_word_embeddings"] else 0
        assert whole == pytest.approx([shapes.stage(0, 1)[0], shapes.stage(0, 1)[1] + twice])


SMALL = {**LLAMA, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
BIG = {**LLAMA, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
RUNS = {
    "tensor": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--params-dtype", "fp32"]),
    "pipeline": (2, ["--pipeline-model-parallel-size", "2", "--params-dtype", "fp32"]),
    "few_bits": (
        1,
        [
            "--mask-logits-dtype", "bf16", "--optimizer-state-dtype", "8bit", "--recompute-granularity", "full",
            "--recompute-method", "uniform", "--recompute-num-layers", "1", "--params-dtype", "fp32", "--micro-batch-size", "1",
            "--global-batch-size", "1", "--seq-length", "128",
        ],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor", "pipeline", pytest.param("few_bits", marks=pytest.mark.long)])
def test_a_run_peaks_within_a_tenth_of_the_plan(name, tmp_path, tiny_dataset):
    """Peak resident memory beyond that of the same run of a model of next to nothing, which has loaded the same libraries."""
    processes, flags = RUNS[name]
    peaks, plans = [], []
    for kind, model in {"small": SMALL, "big": BIG}.items():
        values = {key: value for key, value in model.items() if key != "model_type"}
        folder = tmp_path / kind
        LlamaForCausalLM(LlamaConfig(**values)).to(torch.bfloat16).save_pretrained(folder / "hf")
        convert(str(folder / "hf"), str(folder / "dense"))
        sizes = ["--global-batch-size", "4", "--micro-batch-size", "2", "--seq-length", "256"]
        measured, planned = peak(folder / "dense", tiny_dataset, folder / "run", processes, [*sizes, *flags])
        peaks.append(measured)
        plans.append(planned)
    assert peaks[1] - peaks[0] == pytest.approx(plans[1] - plans[0], rel=0.1)
