"""The other families than LLaMA through the whole pipeline: pruned, trained, trimmed, exported, and read back by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from maskllm import train
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.evaluation.huggingface import block_weights
from maskllm.families.registry import parameter_map
from maskllm.huggingface.mask_file import open_mask_file
from maskllm.patterns import Pattern, unpack_mask
from maskllm.pruning import PruneSettings, prune_hf
from maskllm.pruning.calibration import open_documents, sample_windows
from tests.training.conftest import arguments, metrics

pytestmark = pytest.mark.usefixtures("signal_handlers")

SIZES = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 20, "head_dim": 16}
"""A window below the tests' sequence length, and heads that do not divide the hidden size."""

FAMILIES = {
    "gpt2": {
        "vocab_size": 256, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.15,
        "bos_token_id": 0, "eos_token_id": 0,
    },
    "nemotron": SIZES,
    "qwen2": SIZES | {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": SIZES | {"head_dim": 16, "tie_word_embeddings": True},
    "mistral": SIZES | WINDOW,
    "gemma2": SIZES | WINDOW | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0},
    "gemma3_text": SIZES | WINDOW | {"sliding_window_pattern": 2},
    "phi3": SIZES | {"pad_token_id": 0},
}  # fmt: skip

SEPARATE = (*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MATRICES = dict.fromkeys(FAMILIES, SEPARATE) | {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "nemotron": tuple(name for name in SEPARATE if "gate" not in name),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
}


def run(verb: str, *arguments: object) -> None:
    assert main([verb, *map(str, arguments)]) == 0


def masks_of_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Hugging Face name -> mask, bool [out, in]."""
    checkpoint = resolve(path)
    masks = {}
    for mapping in parameter_map(checkpoint.model_config):
        if mapping.linear is not None:
            bits = checkpoint.tensors[f"{mapping.linear}.mask_bits"].load()
            mask = unpack_mask(bits, checkpoint.tensors[mapping.megatron].shape[1])
            masks.update(zip(mapping.hf, mapping.split(mask, checkpoint.model_config), strict=True))
    return masks


def inputs_last(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A stored weight or mask as [out, in]."""
    return tensor.t() if name.startswith("transformer.") else tensor


def write_model(family: str, path: Path) -> PreTrainedModel:
    """A random model in bf16, with random biases and norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, std=0.1, mean=1.0 if ".ln_" in name and name.endswith(".weight") else 0.0)
    model = model.bfloat16()
    model.save_pretrained(path)
    return model


def learn(load: Path, save: Path, dataset: str, *flags: str) -> None:
    options = {
        "--data-path": dataset, "--load": load, "--save": save, "--train-iters": 4,
        "--global-batch-size": 4, "--seq-length": 32, "--lr": 0.05, "--params-dtype": "fp32", "--eval-iters": 0, "--log-interval": 1,
    }  # fmt: skip
    assert train.main([*(str(part) for option in options.items() for part in option), *flags]) == 0


@pytest.mark.parametrize("family", ["gpt2", "nemotron", "gemma2", pytest.param("gemma3_text", marks=pytest.mark.long)])
def test_recomputation_changes_nothing(family, tmp_path, tiny_dataset):
    """The first two have linears with frozen biases, which Megatron's recomputation of the MLP returns. The others have norms after
    the linears, and attention that is recomputed in any case."""
    write_model(family, tmp_path / "hf")
    run("convert", "--hf", tmp_path / "hf", "--output", tmp_path / "dense")
    run("prune", "--load", tmp_path / "dense", "--output", tmp_path / "pruned", "--method", "magnitude")
    learn(tmp_path / "pruned", tmp_path / "kept", tiny_dataset)
    recompute = ("--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp", "masked_weight")
    learn(tmp_path / "pruned", tmp_path / "recomputed", tiny_dataset, *recompute)
    kept, recomputed = (resolve(tmp_path / name).tensors for name in ("kept", "recomputed"))
    names = [name for name in kept if name.endswith("mask_logits")]
    assert len(names) == 3 * 2 * 4, "the logits and their two moments"
    for name in names:
        assert torch.equal(kept[name].load(), recomputed[name].load()), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["gemma3_text", *(pytest.param(name, marks=pytest.mark.long) for name in FAMILIES if name != "gemma3_text")]
)
def test_split_training_gives_the_run_of_a_single_process(family, ranks, tmp_path, tiny_dataset):
    """Tensor-parallel, pipeline-parallel and with split sequences: the run of one process."""
    write_model(family, tmp_path / "hf")
    run("convert", "--hf", tmp_path / "hf", "--output", tmp_path / "dense")
    run("prune", "--load", tmp_path / "dense", "--output", tmp_path / "pruned", "--method", "magnitude")
    options = {"steps": 3, "save_interval": 3, "eval_iters": 1, "split": "80,20,0"}
    split = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    for name, count, layout in (("single", 1, {}), ("split", 4, split)):
        ranks(count, "maskllm.train", *arguments(tmp_path / name, tiny_dataset, tmp_path / "pruned", **options, **layout))
    for kind, keys in (("train", ("loss", "regularizer", "grad_norm")), ("validation", ("loss_sampled", "loss_winner"))):
        expected, found = (metrics(tmp_path / name, kind) for name in ("single", "split"))
        assert len(expected) == len(found) > 0
        for one, other in zip(expected, found, strict=True):
            for key in keys:
                assert other[key] == pytest.approx(one[key], rel=1e-4 if key == "grad_norm" else 1e-5), (one["iteration"], key)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_pipeline(family, tmp_path, tiny_dataset):
    write_model(family, tmp_path / "hf")
    run("convert", "--hf", tmp_path / "hf", "--output", tmp_path / "dense")
    calibration = ["--calibration-data", tiny_dataset, "--calibration-samples", 4, "--seq-length", 32, "--seed", 3]
    run(
        "prune", "--load", tmp_path / "dense", "--output", tmp_path / "pruned", "--method", "wanda", "--params-dtype", "fp32",
        *calibration,
    )  # fmt: skip
    names = sorted(
        f"{prefix}.{layer}.{name}.weight"
        for prefix in ["transformer.h" if family == "gpt2" else "model.layers"]
        for layer in range(2)
        for name in MATRICES[family]
    )

    # One-shot masks of the checkpoint are those of the model in memory.
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = sample_windows(open_documents(tiny_dataset, tmp_path / "hf"), 4, 32, seed=3)
    expected = prune_hf(in_memory, tokens, PruneSettings("wanda", Pattern(2, 4))).masks
    prior = masks_of_checkpoint(tmp_path / "pruned")
    assert sorted(prior) == sorted(expected) == names
    assert all(torch.equal(mask, unpack_mask(expected[name], mask.shape[1])) for name, mask in prior.items())

    learn(tmp_path / "pruned", tmp_path / "trained", tiny_dataset)
    run("trim", "--load", tmp_path / "trained", "--output", tmp_path / "trimmed")
    run("export", "--load", tmp_path / "trimmed", "--output", tmp_path / "sparse", "--mask-file", tmp_path / "masks.npz")

    learned = masks_of_checkpoint(tmp_path / "trimmed")
    assert any(not torch.equal(learned[name], prior[name]) for name in names), "training moved no mask"
    before, after = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "sparse" / "model.safetensors")
    assert before.keys() == after.keys()
    with np.load(tmp_path / "masks.npz", allow_pickle=False) as masks:
        assert sorted(masks.files) == [f"{name}.mask" for name in names]
        for name, weight in before.items():
            if name not in names:
                assert torch.equal(after[name], weight), name
                continue
            mask = torch.from_numpy(np.unpackbits(masks[f"{name}.mask"], count=weight.numel()).reshape(weight.shape)).bool()
            assert torch.equal(inputs_last(name, mask), learned[name])
            assert inputs_last(name, mask).unflatten(1, (-1, 4)).sum(-1).eq(2).all(), name
            assert torch.equal(after[name], weight * mask), name

    sparse, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    masked = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    open_mask_file(tmp_path / "masks.npz").apply(block_weights(masked))
    with torch.no_grad():
        assert torch.equal(masked(tokens).logits, sparse(tokens).logits)
