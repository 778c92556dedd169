"""A model whose hidden size is not a multiple of its heads, but whose config states `head_dim`, through the whole pipeline.

kanana-1.5-2.1b is one: hidden size 1792, 24 heads, head_dim 128. transformers 5.4 and later refuse to make its config.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from maskllm import train
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.evaluation.huggingface import hf_window_nlls
from maskllm.evaluation.megatron import load_masked_model, megatron_window_nlls
from maskllm.huggingface.config import load_config
from maskllm.huggingface.loading import load_hf_model
from maskllm.megatron.process_groups import parallel_processes
from maskllm.patterns import Pattern, unpack_mask
from maskllm.pruning import PruneSettings, prune_hf
from maskllm.pruning.calibration import open_documents, sample_windows
from tests.pruning.pruned import calibrated, hf_masks

pytestmark = pytest.mark.usefixtures("signal_handlers")

HIDDEN, HEADS, HEAD_DIM = 28, 6, 8
SIZES = {
    "vocab_size": 256, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "head_dim": HEAD_DIM, "max_position_embeddings": 64, "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model as `hf`, as people upload it, and as `dense`."""
    path = tmp_path_factory.mktemp("head_dim")
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=HEADS * HEAD_DIM, **SIZES)
    config.save_pretrained(path / "hf")
    values = json.loads((path / "hf" / "config.json").read_text())
    config.hidden_size = HIDDEN
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.config.hidden_size = HEADS * HEAD_DIM  # what transformers is willing to write
    model.save_pretrained(path / "hf")
    (path / "hf" / "config.json").write_text(json.dumps(values | {"hidden_size": HIDDEN}))
    assert load_file(path / "hf" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].shape == (48, HIDDEN)
    assert main(["convert", "--hf", str(path / "hf"), "--output", str(path / "dense")]) == 0
    return path


def nll(model: PreTrainedModel) -> float:
    return hf_window_nlls(model)(torch.arange(60)[None])[0]


def megatron_nll(path: Path) -> float:
    with parallel_processes():
        return megatron_window_nlls(load_masked_model(resolve(path), torch.float32))(torch.arange(60)[None])[0]


def test_the_config_is_transformers_own(folder, tmp_path):
    config = load_config(folder / "hf")
    assert (config.hidden_size, config.head_dim, config.num_attention_heads) == (HIDDEN, HEAD_DIM, HEADS)
    # A model that transformers takes as it is has the config that transformers reads.
    values = json.loads((folder / "hf" / "config.json").read_text()) | {"hidden_size": 36}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path).to_dict() == AutoConfig.from_pretrained(tmp_path).to_dict()


def test_both_evaluations_agree(folder):
    assert megatron_nll(folder / "dense") == pytest.approx(nll(load_hf_model(folder / "hf", device=torch.device("cpu"))), rel=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_pruned_on_an_indexed_dataset_as_in_memory(method, folder, tiny_dataset, tmp_path):
    output = tmp_path / "pruned"
    assert main(["prune", "--load", str(folder / "dense"), "--output", str(output), *calibrated(tiny_dataset, method)]) == 0
    model = load_hf_model(folder / "hf", device=torch.device("cpu"))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    tokens = sample_windows(open_documents(tiny_dataset, folder / "hf"), 6, 48, seed=3)
    expected, found = prune_hf(model, tokens, PruneSettings(method, Pattern(2, 4))).masks, hf_masks(output)
    assert len(found) == 14 and found.keys() == expected.keys()
    assert all(torch.equal(mask, unpack_mask(expected[name], shapes[name][1])) for name, mask in found.items())
    assert megatron_nll(output) == pytest.approx(nll(model), rel=1e-5), "the masks' losses"


def test_learned_masks_are_exported(folder, tiny_dataset, tmp_path):
    def run(verb: str, *words: object) -> None:
        assert main([verb, *map(str, words)]) == 0

    run("prune", "--load", folder / "dense", "--output", tmp_path / "pruned", "--method", "magnitude")
    options = {
        "--data-path": tiny_dataset, "--load": tmp_path / "pruned", "--save": tmp_path / "trained", "--train-iters": 2,
        "--global-batch-size": 2, "--seq-length": 32, "--lr": 0.05, "--params-dtype": "fp32", "--eval-iters": 0,
    }  # fmt: skip
    assert train.main([str(part) for option in options.items() for part in option]) == 0
    run("trim", "--load", tmp_path / "trained", "--output", tmp_path / "trimmed")
    run("export", "--load", tmp_path / "trimmed", "--output", tmp_path / "sparse")
    sparse = load_hf_model(tmp_path / "sparse", device=torch.device("cpu"))
    assert nll(sparse) == pytest.approx(megatron_nll(tmp_path / "trimmed"), rel=1e-5)
    run("plan", "--model", folder / "hf", "--tensor-model-parallel-size", 2)
