"""`maskllm plan`: memory, layouts and settings for well-known models, and the arithmetic of a step."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from maskllm import train
from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.cli.train_options import parse_arguments
from maskllm.errors import MaskLLMError
from maskllm.families.registry import parameter_map
from maskllm.patterns import Pattern
from maskllm.planning.cost import BANDWIDTH_EFFICIENCY, GPUS, Cluster, checkpoint_bytes, step_cost
from maskllm.planning.memory import Layout, layer_activations, norm_activations
from maskllm.planning.models import BUILT_IN, named_model
from maskllm.planning.plan import plan
from maskllm.pruning.megatron import prune_without_data
from maskllm.pruning.solve import PruneSettings
from maskllm.training.arguments import TrainArguments

H100 = Cluster(GPUS["h100-80gb"])


def planned(tmp_path, *flags: str) -> dict:
    assert main(["plan", *flags, "--json", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-2-7b", 6.74),
        ("llama-2-13b", 13.02),
        ("llama-3-8b", 8.03),
        ("llama-3.1-8b", 8.03),
        ("nemotron-4-15b", 15.6),
        ("gpt3-843m", 0.83),
        ("gpt3-2b", 2.26),
        ("smollm2-135m", 0.1345),
    ],
)
def test_built_in_models_have_their_published_sizes(name, billions):
    model = named_model(name)
    parameters = sum(math.prod(mapping.megatron_shape(model)) for mapping in parameter_map(model))
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)
    assert set(BUILT_IN) >= {name}


@pytest.mark.parametrize(
    "flags",
    [
        ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
        ("--sequence-parallel", "--recompute-granularity", "selective", "--recompute-modules", "mlp", "masked_weight"),
        ("--optimizer-state-dtype", "bf16", "--sequence-parallel"),
    ],
    ids=["full", "selective", "bf16_moments"],
)
def test_llama_2_7b_on_eight_gpus_takes_at_most_25_gb(flags, tmp_path):
    found = planned(
        tmp_path, "--model", "llama-2-7b", "--num-gpus", "8", "--tensor-model-parallel-size", "8", "--seq-length", "4096",
        "--gpu-memory", "25", *flags,
    )  # fmt: skip
    assert found["fits"], found["asked"]
    assert found["asked"]["memory"]["mask_logits"] == 4 * 1.5 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) / 8


def test_a_plan_names_the_settings_that_save_memory_without_changing_results(tmp_path, capsys):
    command = ("--model", "llama-2-7b", "--num-gpus", "8", "--tensor-model-parallel-size", "8", "--seq-length", "4096")
    found = planned(tmp_path, *command, "--gpu-memory", "80")
    assert found["fits"]
    leanest = found["least_memory_without_loss"]
    assert leanest["memory"]["total"] <= 25e9 < found["asked"]["memory"]["total"]
    assert leanest["settings"] in capsys.readouterr().out
    assert "dtype" not in leanest["settings"]
    two_copies = planned(tmp_path, *command[:5], "4", *command[6:], "--gpu-memory", "45")
    assert "--use-distributed-optimizer" in two_copies["least_memory_without_loss"]["settings"]


@pytest.mark.parametrize(("gigabytes", "moments"), [(80, "8bit"), (141, "bf16")])
def test_llama_2_7b_fits_on_one_gpu_with_the_proposed_settings(tmp_path, gigabytes, moments, capsys):
    model = ("--model", "llama-2-7b", "--num-gpus", "1", "--gpu-memory", str(gigabytes))
    found = planned(tmp_path, *model)
    assert not found["fits"] and not found["layouts_that_fit"]
    settings = found["settings_that_fit"]["settings"]
    assert f"--optimizer-state-dtype {moments}" in settings
    assert settings in capsys.readouterr().out
    again = planned(tmp_path, *model, *settings.split())
    assert again["fits"]
    assert again["asked"]["memory"]["total"] == found["settings_that_fit"]["memory"]["total"] < gigabytes * 1e9


def test_layouts_divide_the_model_and_the_fastest_comes_first(tmp_path):
    found = planned(tmp_path, "--model", "smollm2-135m", "--num-gpus", "6", "--seq-length", "1024", "--global-batch-size", "24")
    layouts = {(one["layout"]["tensor"], one["layout"]["pipeline"], one["layout"]["data"]) for one in found["layouts_that_fit"]}
    assert layouts == {(1, 1, 6), (1, 2, 3), (1, 3, 2), (1, 6, 1), (3, 1, 2), (3, 2, 1)}  # nine heads, thirty layers
    seconds = [one["step"]["seconds"] for one in found["layouts_that_fit"]]
    assert seconds == sorted(seconds)


def test_each_setting_changes_memory_as_expected():
    model = named_model("llama-2-7b")

    def memory(**settings):
        layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
        arguments = TrainArguments(**layout | settings)
        return plan(model, arguments, num_gpus=8, gpu_bytes=80e9, cluster=H100).asked.memory

    base = memory()
    assert memory(mask_logits_dtype="bf16").mask_logits == base.mask_logits / 2 == memory(mask_logits_dtype="bf16").gradients
    assert memory(optimizer_state_dtype="bf16").optimizer_state == base.optimizer_state / 2
    assert memory(optimizer_state_dtype="8bit").optimizer_state == pytest.approx(base.optimizer_state / 4, rel=0.02)
    assert memory(use_distributed_optimizer=True).optimizer_state == base.optimizer_state / 2  # two data-parallel ranks
    assert memory(sequence_parallel=True).activations < base.activations
    assert memory(seq_length=2048).activations == pytest.approx(base.activations / 2, rel=0.01)
    selective = memory(recompute_granularity="selective", recompute_modules=["masked_weight"])
    assert selective.masked_weights == 0 and selective.activations == pytest.approx(base.activations, rel=0.01)
    assert base.masked_weights == 2 * 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) / 2 / 2  # two in flight, bf16
    full = memory(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    assert full.activations < 0.1 * base.activations
    assert full.masked_weights == 0
    assert full.temporary > base.temporary


def test_grouped_keys_and_values_are_repeated_in_fp32_on_a_gpu():
    model, tokens = named_model("llama-3-8b"), 4096
    base = TrainArguments(seq_length=tokens, params_dtype="fp32")
    for options, repeated in (({}, 2 * 4 * 4096 * tokens), ({"params_dtype": "bf16"}, 0)):
        arguments = dataclasses.replace(base, **options)
        cuda, cpu = (layer_activations(model, arguments, Layout(1, 1, 1), device=device) for device in ("cuda", "cpu"))
        norms = 2 * sum(
            sign * norm_activations(model, arguments, Layout(1, 1, 1), device=device) for sign, device in ((1, "cuda"), (-1, "cpu"))
        )
        assert cuda - cpu - norms == repeated


def test_the_flops_of_a_step():
    """6 FLOPs per token and weight (8 with full recomputation), plus attention and the vocabulary."""
    model = named_model("llama-2-7b")
    arguments = TrainArguments(seq_length=128, global_batch_size=4)
    cost = step_cost(model, arguments, Layout(1, 1, 1), H100)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 32 * 6 * 128 * 4096  # two causal products, half computed; once forward, twice backward
    assert cost.flops == pytest.approx(512 * (6 * weights + attention + 4 * 32000 * 4096), rel=1e-6)
    full = dataclasses.replace(arguments, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    again = step_cost(model, full, Layout(1, 1, 1), H100)
    assert again.flops - cost.flops == pytest.approx(512 * (2 * weights + attention / 3), rel=1e-6)
    assert again.seconds > cost.seconds
    for module, products in (("mlp", 2 * 32 * 3 * 4096 * 11008), ("core_attn", attention / 3), ("masked_weight", 0)):
        some = dataclasses.replace(arguments, recompute_granularity="selective", recompute_modules=[module])
        assert step_cost(model, some, Layout(1, 1, 1), H100).flops - cost.flops == pytest.approx(512 * products, rel=1e-6)
    logits = 1.5 * weights
    # Weights in fp16, mask bits, and fp32 logits with two moments.
    assert checkpoint_bytes(model, arguments) == pytest.approx(2 * 6.738e9 + weights / 8 + 12 * logits, rel=1e-3)


TEACHER = {"kl_loss_coeff": 1.0, "squarehead_loss_coeff": 0.1}
"""Both terms of a teacher."""


def test_what_training_the_weights_costs():
    """The same products as for masks: the gradients of the masked weights are needed for either. A teacher adds a forward pass."""
    model = named_model("llama-2-7b")
    sizes = {"seq_length": 128, "global_batch_size": 4, "tensor_model_parallel_size": 4}

    def cost(data: int = 1, **settings):
        return step_cost(model, TrainArguments(**sizes | settings), Layout(4, 1, data), H100)

    weights, vocabulary = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    masks, trained, both = cost(), cost(train="weights"), cost(train="both")
    assert masks.flops == trained.flops == both.flops
    assert trained.memory_traffic < masks.memory_traffic < both.memory_traffic
    assert cost(train="both", train_embeddings=True).flops - both.flops == pytest.approx(512 * 2 * vocabulary)
    attention = 32 * 2 * 128 * 4096
    for settings, product in (({"kl_loss_coeff": 1.0}, 2 * vocabulary), ({"squarehead_loss_coeff": 1.0}, 0)):
        for train_ in ("masks", "weights", "both"):
            added = cost(train=train_, **settings).flops - masks.flops
            assert added == pytest.approx(512 * (2 * weights + attention + product), rel=1e-6)
    with_teacher = cost(train="both", **TEACHER)
    assert with_teacher.link_traffic == pytest.approx(masks.link_traffic * 6 / 4)
    assert with_teacher.seconds > both.seconds > masks.seconds
    # Data-parallel ranks sum fp32 gradients; the distributed optimizer gathers bf16 weights instead of the second half.
    norms = 32 * 2 * 4096
    for split, bytes_each in ((False, 8), (True, 6)):
        one, two = (cost(data=2, train=train_, use_distributed_optimizer=split) for train_ in ("masks", "both"))
        assert two.link_traffic - one.link_traffic == pytest.approx((weights / 4 + norms) * bytes_each / 2)


def test_hidden_states_of_a_teacher_travel_between_stages():
    arguments = TrainArguments(seq_length=128, global_batch_size=4, pipeline_model_parallel_size=2, train="both")
    alone, taught = (
        step_cost(named_model("llama-2-7b"), dataclasses.replace(arguments, **settings), Layout(1, 2, 1), H100).link_traffic
        for settings in ({}, TEACHER)
    )
    assert taught == 2 * alone == 2 * 4 * 2 * (128 * 4096 * 2)


def test_each_way_to_train_has_its_memory():
    model = named_model("llama-2-7b")
    weights, norms, vocabulary = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32 * 2 * 4096, 2 * 32000 * 4096 + 4096

    def memory(ranks: int = 1, **settings):
        return plan(model, TrainArguments(**settings), num_gpus=ranks, gpu_bytes=80e9, cluster=H100).asked.memory

    masks, trained, both = (memory(train=train_) for train_ in ("masks", "weights", "both"))
    assert (masks.masters, masks.teacher, masks.gradients) == (0, 0, 6 * weights)
    assert (trained.mask_logits, trained.masked_weights, trained.mask_bits) == (0, 0, weights / 8)
    assert trained.masters == trained.gradients == trained.optimizer_state / 2 == 4 * (weights + norms)
    assert both.masked_weights == masks.masked_weights == 2 * weights
    for field in ("gradients", "optimizer_state", "masters"):
        assert getattr(both, field) == getattr(masks, field) + getattr(trained, field)
    assert memory(train="weights", params_dtype="fp32").masters == 0
    assert memory(train="weights", train_embeddings=True).masters == 4 * (weights + norms + vocabulary)
    split = memory(ranks=2, train="both", use_distributed_optimizer=True)
    assert (split.masters, split.optimizer_state) == (both.masters / 2, both.optimizer_state / 2)
    assert memory(train="both", **TEACHER).teacher == masks.weights == 2 * (weights + norms + vocabulary)
    assert memory(**TEACHER).teacher == 0
    assert memory(**TEACHER, teacher="a checkpoint").teacher == masks.weights
    states = 32 * 4096 * 4096 * 2  # of the teacher, after each layer
    assert memory(**TEACHER).activations - masks.activations == states
    assert memory(kl_loss_coeff=1.0).activations == masks.activations
    two = {"pipeline_model_parallel_size": 2}
    assert memory(ranks=2, **two, **TEACHER).communication == 2 * memory(ranks=2, **two).communication


def test_the_text_names_what_is_trained(tmp_path, capsys):
    command = ("--model", "llama-2-7b", "--num-gpus", "8", "--tensor-model-parallel-size", "8")
    planned(tmp_path, *command)
    text = capsys.readouterr().out
    assert "weights, frozen" in text and "mask logits" in text and "masters" not in text and "teacher" not in text
    planned(tmp_path, *command, "--train", "weights")
    text = capsys.readouterr().out
    assert "fp32 masters of the trained weights" in text and "fixed mask, as bits" in text and "mask logits" not in text
    found = planned(tmp_path, *command, "--train", "both", "--kl-loss-coeff", "1", "--squarehead-loss-coeff", "0.1")
    text = capsys.readouterr().out
    assert all(
        words in text for words in ("the teacher's weights, frozen", "fp32 masters", "mask logits", "those of the layers trained")
    )
    assert found["asked"]["memory"]["teacher"] > 0
    assert not any("dtype" in one["settings"] for one in found["layouts_that_fit"])


WEIGHTS = ["--train", "weights"]
BOTH = ["--train", "both", "--kl-loss-coeff", "1"]
EMBEDDINGS = ["--train-embeddings"]
BF16, SPLIT = ["--params-dtype", "bf16"], ["--use-distributed-optimizer"]


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("bfloat16", []),
        ("float32", []),
        ("bfloat16", SPLIT),
        ("bfloat16", WEIGHTS),
        ("bfloat16", [*WEIGHTS, *EMBEDDINGS, *BF16]),
        ("float32", [*BOTH, *BF16]),
        ("bfloat16", [*BOTH, *SPLIT]),
        ("bfloat16", [*BOTH, *BF16, *SPLIT]),
    ],
    ids=lambda value: "".join(value) or "masks",
)
def test_a_planned_checkpoint_is_as_large_as_a_real_one(dtype, options, tmp_path, tiny_hf, tiny_pruned, tiny_dataset):
    hf, start = tiny_hf, tiny_pruned
    if dtype == "float32":
        hf, start = tmp_path / "hf", tmp_path / "pruned"
        LlamaForCausalLM.from_pretrained(tiny_hf, dtype=torch.float32).save_pretrained(hf)
        convert(hf, tmp_path / "dense")
        prune_without_data(tmp_path / "dense", start, PruneSettings("magnitude", Pattern(2, 4)))
    flags = [
        "--data-path", tiny_dataset, "--load", str(start), "--save", str(tmp_path / "run"), "--train-iters", "1", "--global-batch-size",
        "1", "--seq-length", "32", "--params-dtype", "fp32", "--eval-iters", "0", *options,
    ]  # fmt: skip
    assert train.main(flags) == 0
    files = sum(path.stat().st_size for path in (tmp_path / "run" / "iter_0000001").rglob("*") if path.is_file())
    stored = resolve(tmp_path / "run").tensors
    tensors = sum(tensor.nbytes for tensor in stored.values())
    assert 0 < files - tensors < 3000 * len(stored)  # each tensor's header and its part of the index
    for source in (hf, start, tmp_path / "run"):
        assert checkpoint_bytes(named_model(str(source)), parse_arguments(flags)) == tensors


@pytest.mark.parametrize(
    ("stated", "dtype"),
    [({"dtype": "float16"}, "float16"), ({"torch_dtype": "bfloat16"}, "bfloat16"), ({}, "float32"), ({"dtype": None}, "float32")],
)
def test_the_config_states_the_dtype_of_the_stored_weights(stated, dtype, tmp_path):
    values = {key: value for key, value in BUILT_IN["smollm2-135m"].items() if key != "torch_dtype"}
    (tmp_path / "config.json").write_text(json.dumps(values | stated))
    assert named_model(str(tmp_path)).stored_dtype is getattr(torch, dtype)


@pytest.mark.parametrize(
    ("options", "reductions"),
    [
        ({}, 4),
        ({"sequence_parallel": True}, 5),  # two linears gather their inputs again, half an all-reduce each
        ({"sequence_parallel": True, "recompute_granularity": "selective", "recompute_modules": ["mlp", "masked_weight"]}, 6),
        ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 6),
        ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 16}, 5),
    ],
)
def test_the_bytes_that_a_tensor_parallel_rank_sends(options, reductions):
    arguments = TrainArguments(seq_length=4096, global_batch_size=2, tensor_model_parallel_size=8, **options)
    cost = step_cost(named_model("llama-2-7b"), arguments, Layout(8, 1, 1), H100)
    assert cost.link_traffic == pytest.approx(2 * 32 * reductions * 2 * (2 * 4096 * 4096) * 7 / 8)


def test_the_distributed_optimizer_reads_only_its_share():
    arguments = TrainArguments(seq_length=4096, global_batch_size=2, tensor_model_parallel_size=4)
    split = dataclasses.replace(arguments, use_distributed_optimizer=True)
    one, two = (step_cost(named_model("llama-2-7b"), some, Layout(4, 1, 2), H100) for some in (arguments, split))
    optimizer = 1.5 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) / 4 * (4 * 4 + 4 * 4)
    assert one.memory_traffic - two.memory_traffic == pytest.approx(optimizer / 2)


@pytest.mark.parametrize(
    ("layout", "sequence_parallel", "bytes_between_nodes"),
    [
        # All-reduces of the hidden states (bf16, 4 per layer; a ring sends twice their size), and of the logits' gradients (fp32).
        # A stage's outputs and their gradients; with two stages and one micro-batch the pipeline bubble doubles their time.
        (Layout(16, 1, 1), False, 32 * 4 * 2 * (2 * 4096 * 4096) * 15 / 16),
        (Layout(8, 1, 2), False, 2 * 4 * 1.5 * 32 * (4 * 4096**2 + 3 * 4096 * 11008) / 8 / 2),
        (Layout(8, 2, 1), False, 2 * 2 * (2 * 4096 * 4096)),
        (Layout(8, 2, 1), True, 2 * 2 * (2 * 4096 * 4096) / 8),
    ],
    ids=["tensor", "data", "pipeline", "pipeline of split sequences"],
)
def test_only_transfers_between_nodes_use_the_networks_bandwidth(layout, sequence_parallel, bytes_between_nodes):
    model = named_model("llama-2-7b")
    arguments = TrainArguments(
        seq_length=4096, global_batch_size=layout.data, tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    gpu = GPUS["h100-80gb"]
    one_node = step_cost(model, arguments, layout, Cluster(gpu, gpus_per_node=16)).seconds
    two_nodes = step_cost(model, arguments, layout, Cluster(gpu, gpus_per_node=8, network=25e9)).seconds
    extra = bytes_between_nodes * (1 / 25e9 - 1 / gpu.link) / BANDWIDTH_EFFICIENCY
    assert two_nodes - one_node == pytest.approx(extra, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--gpus-per-node", "0"), "--gpus-per-node: found 0"),
        (("--network-bandwidth", "nan"), "--network-bandwidth: found nan"),
        (("--num-gpus", "3", "--tensor-model-parallel-size", "2"), "--num-gpus 3: wanted a multiple of"),
        (("--tensor-model-parallel-size", "3"), "tensor-model-parallel size 3 does not divide"),
        (("--pipeline-model-parallel-size", "5"), "--pipeline-model-parallel-size 5: wanted a divisor of the model's 32 layers"),
        (("--gpu-memory", "-1"), "--gpu-memory: found -1.0"),
        (("--num-gpus", "0"), "--num-gpus: found 0"),
        (("--recompute-method", "block"), "--recompute-method: wanted only with"),
        (("--pattern", "2:6"), "self_attention.linear_qkv: its"),
        (("--num-gpus", "512",), "--global-batch-size 256: wanted a multiple"),
        (("--seq-length", "4097"), "--seq-length 4097: the model has a context of 4096 tokens"),
        (("--seq-length", "0"), "--seq-length: found 0"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(flags, message, capsys):
    assert main(["plan", "--model", "llama-2-7b", *flags]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "tokens"), [("gpt3-2b", 2048), ("llama-2-7b", 4096), ("llama-3.1-8b", 4096)])
def test_the_default_sequence_length_is_at_most_the_models_context(name, tokens, capsys):
    assert main(["plan", "--model", name]) == 0
    assert f"; 256 sequences of {tokens} tokens a step, 1 a micro-batch\n" in capsys.readouterr().out


def test_the_memory_limit_is_the_gpus_unless_the_user_gives_one(tmp_path, capsys):
    command = ("--model", "llama-2-7b", "--num-gpus", "8", "--tensor-model-parallel-size", "8", "--gpu", "a100-40gb")
    assert planned(tmp_path, *command)["gpu_bytes"] == 40e9
    assert "fits in 40 GB\n" in capsys.readouterr().out
    assert planned(tmp_path, *command, "--gpu-memory", "20")["gpu_bytes"] == 20e9
    assert "DOES NOT FIT in 20 GB, the given --gpu-memory (a100-40gb has 40 GB)\n" in capsys.readouterr().out
    assert all(gpu.memory == 1e9 * int(re.search(r"-(\d+)gb$", name)[1]) for name, gpu in GPUS.items())


def test_a_plan_for_the_cpu_does_not_mention_gpus(tmp_path, capsys):
    found = planned(tmp_path, "--model", "smollm2-135m", "--num-gpus", "2", "--device", "cpu", "--gpu-memory", "16")
    text = capsys.readouterr().out
    assert found["fits"] and "fits in 16 GB\n" in text
    assert not re.search("h100|GPU|CUDA|NCCL| s on |s/step|fastest", text), text
    sizes = [one["memory"]["total"] for one in found["layouts_that_fit"]]
    assert len(sizes) == 2 and sizes == sorted(sizes)
    assert found["asked"]["step"]["seconds"] is None


def test_a_million_gpus_are_planned_in_seconds(tmp_path):
    command = ("--model", "llama-2-7b", "--num-gpus", "1000000", "--global-batch-size", "1000000")
    layouts = [one["layout"] for one in planned(tmp_path, *command)["layouts_that_fit"]]
    assert layouts and all(one["tensor"] * one["pipeline"] * one["data"] == 1000000 for one in layouts)


def test_settings_that_change_what_is_learned_are_marked(tmp_path, capsys):
    assert planned(tmp_path, "--model", "llama-2-7b", "--gpu-memory", "141")["settings_that_fit"]
    text = capsys.readouterr().out
    assert "bf16 moments change what is learned" in text and "logits change" not in text
    assert planned(tmp_path, "--model", "llama-2-7b")["settings_that_fit"]
    text = capsys.readouterr().out
    assert "each step rounds them stochastically, and the gradients of a step's 256 micro-batches are summed in bf16" in text
    assert "8bit moments change what is learned" in text
    planned(tmp_path, "--model", "llama-2-7b", "--num-gpus", "8", "--tensor-model-parallel-size", "8", "--gpu-memory", "25")
    assert "change what is learned" not in capsys.readouterr().out


def test_the_readmes_plan_fits(tmp_path):
    (command,) = re.findall(
        r"`maskllm plan (.*?)`", (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert planned(tmp_path, *shlex.split(command))["fits"]


def test_a_model_directory_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(BUILT_IN["smollm2-135m"]))
    assert named_model(str(tmp_path)) == named_model("smollm2-135m")


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("llama2-7b", "llama-2-7b"),
        ("llama2-13b", "llama-2-13b"),
        ("llama3-8b", "llama-3-8b"),
        ("llama3.1-8b", "llama-3.1-8b"),
        ("nemotron4-15b", "nemotron-4-15b"),
        ("Llama-2-7b-hf", "llama-2-7b"),
        ("no-such-model", None),
    ],
)
def test_an_unknown_name_lists_the_known_ones_and_the_closest(name, closest, capsys):
    assert main(["plan", "--model", name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"maskllm plan: error: {name}: no such directory, ")
    names, _, found = line.partition(" a hub id or one of ")[2].partition("; the closest is ")
    assert names.split(", ") == list(BUILT_IN)
    assert found == (closest or "")


def test_a_missing_path_and_a_file_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("llama2-7b").touch()
    for name, message in (("llama2-7b", "is a file"), (str(tmp_path / "llama-2"), "no such directory, and not a hub id")):
        with pytest.raises(MaskLLMError, match=message):
            named_model(name)
