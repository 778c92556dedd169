"""The dtype that a weight is stored in is one thing, the dtype that the layers compute in another: only the first one rounds weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from maskllm.checkpoints.convert import convert
from maskllm.cli import main
from maskllm.patterns import Pattern, unpack_mask
from maskllm.pruning import PruneSettings, prune_hf
from maskllm.pruning.calibration import open_documents, sample_windows
from maskllm.pruning.solve import prune_matrices
from maskllm.pruning.statistics import InputStatistics
from tests.pruning.pruned import calibrated, hf_masks
from tests.pruning.test_sparsegpt import algorithm_1

PATTERN = Pattern(2, 4)

STORED = {
    "q_proj": torch.float16,
    "k_proj": torch.float16,
    "v_proj": torch.float16,
    "o_proj": torch.float64,
    "gate_proj": torch.float32,
    "up_proj": torch.float32,
    "down_proj": torch.bfloat16,
    "input_layernorm": torch.float32,
}
"""The dtypes of a layer's weights. Others, among them the layer's last tensor, are bf16."""


def stored_dtype(name: str) -> torch.dtype:
    return next((dtype for part, dtype in STORED.items() if f".{part}." in name), torch.bfloat16)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_hf) -> Path:
    """A folder with a model of mixed dtypes as `hf` and `dense`. No wider weight fits into bf16."""
    folder = tmp_path_factory.mktemp("mixed")
    model = LlamaForCausalLM.from_pretrained(tiny_hf, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        tensors[name] = (weight * (1 + 0.01 * noise)).to(stored_dtype(name)).contiguous()
    tensors.pop("lm_head.weight")  # tied
    model.config.save_pretrained(folder / "hf")
    save_file(tensors, folder / "hf" / "model.safetensors", metadata={"format": "pt"})
    convert(folder / "hf", folder / "dense")
    return folder


@pytest.fixture(scope="module")
def pruned(mixed, tiny_dataset) -> Path:
    """`mixed`, pruned with updated weights; its layers compute in bf16, as by default."""
    path = mixed / "pruned"
    options = calibrated(tiny_dataset, "sparsegpt", "--update-weights", "--params-dtype", "bf16")
    assert main(["prune", "--load", str(mixed / "dense"), "--output", str(path), *options]) == 0
    return path


@pytest.fixture(scope="module")
def exported(mixed, pruned) -> dict[str, torch.Tensor]:
    """The tensors of `pruned`, trimmed and exported."""
    assert main(["trim", "--load", str(pruned), "--output", str(mixed / "trimmed")]) == 0
    assert main(["export", "--load", str(mixed / "trimmed"), "--output", str(mixed / "sparse")]) == 0
    return load_file(mixed / "sparse" / "model.safetensors")


def linears(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.endswith("_proj.weight")}


def test_an_exported_weight_that_sparsegpt_never_moves_has_its_bits(mixed, pruned, exported):
    """No update moves the first column. Trim and export hand on what `prune` has stored."""
    before, masks = load_file(mixed / "hf" / "model.safetensors"), hf_masks(pruned)
    assert len(linears(before)) == 28
    for name, weight in before.items():
        assert exported[name].dtype == stored_dtype(name), name
        if name not in masks:
            assert torch.equal(exported[name], weight), name
            continue
        kept = masks[name][:, 0]
        assert 0 < kept.sum() < len(kept)
        assert torch.equal(exported[name][kept, 0], weight[kept, 0]), name
        moved = (exported[name] != weight)[masks[name]].float().mean()
        assert moved > 0.5, name


def test_moved_weights_are_those_of_the_papers_algorithm_rounded_once(mixed, exported, tiny_dataset):
    """Algorithm 1 in fp64 on the stored weights, with the inputs that the first layer computes in bf16."""
    stored = load_file(mixed / "hf" / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(mixed / "hf", dtype=torch.bfloat16).eval()
    inputs = {}
    for name in ("q_proj", "o_proj", "gate_proj", "down_proj"):
        module = next(module for path, module in model.model.layers[0].named_modules() if path.endswith(name))
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0][0].double()))
    tokens = sample_windows(open_documents(tiny_dataset, mixed / "hf"), 6, 48, seed=3)
    with torch.no_grad():
        for sample in tokens.split(1):
            model(sample)
    for reader, of in {"q_proj": "qkv", "o_proj": "o", "gate_proj": ("gate", "up"), "down_proj": ("down",)}.items():
        every = torch.cat(inputs[reader])
        hessian = 2 / len(tokens) * every.T @ every
        for part in of:
            name = next(name for name in stored if name.startswith("model.layers.0.") and f".{part}_proj." in name)
            _, exact = algorithm_1(stored[name], hessian, PATTERN)
            rows = ((exported[name] != 0) == (exact != 0)).all(1)  # two nearly equal scores may be ordered differently
            assert rows.float().mean() > 0.9, name
            # The rounding to what is stored, and the sweep's in fp32.
            half = torch.finfo(stored[name].dtype).eps / 2
            torch.testing.assert_close(exported[name][rows].double(), exact[rows], rtol=2e-5 + half, atol=2e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_a_model_in_memory_keeps_what_is_not_moved(dtype, tiny_hf):
    model = LlamaForCausalLM.from_pretrained(tiny_hf, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    dense = copy.deepcopy(model.state_dict())
    tokens = torch.randint(0, 256, (4, 32), generator=generator)
    result = prune_hf(model, tokens, PruneSettings("sparsegpt", PATTERN, update_weights=True))
    for name, weight in linears(model.state_dict()).items():
        kept = unpack_mask(result.masks[name], weight.shape[1])[:, 0]
        assert weight.dtype == dtype
        assert torch.equal(weight[kept, 0], dense[name][kept, 0]), name


def test_matrices_with_one_input_keep_their_own_dtypes():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    statistics = InputStatistics(32)
    statistics.add(inputs)
    dtypes = {"q": torch.float16, "k": torch.float32, "v": torch.bfloat16}
    weights = {name: torch.randn(8, 32, generator=generator, dtype=torch.float64).to(dtype) for name, dtype in dtypes.items()}
    solved = prune_matrices(weights, statistics, PruneSettings("sparsegpt", PATTERN, update_weights=True))
    _, exact = algorithm_1(torch.cat([weight.double() for weight in weights.values()]), statistics.hessian(), PATTERN)
    for (name, weight), expected in zip(weights.items(), exact.split(8), strict=True):
        assert solved[name].weight.dtype == weight.dtype
        kept = solved[name].mask[:, 0]
        assert torch.equal(solved[name].weight[kept, 0], weight[kept, 0])
        rounding = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(solved[name].weight.double(), expected, rtol=1e-4 + rounding / 2, atol=1e-4, msg=name)


def test_masks_are_chosen_on_the_stored_weights(mixed, tiny_dataset, tmp_path):
    """Magnitude with calibration data, which computes in bf16, chooses what it chooses without."""
    data = calibrated(tiny_dataset, "magnitude", "--params-dtype", "bf16")
    for output, options in (("with", data), ("without", ["--method", "magnitude"])):
        assert main(["prune", "--load", str(mixed / "dense"), "--output", str(tmp_path / output), *options]) == 0
    one, other = hf_masks(tmp_path / "with"), hf_masks(tmp_path / "without")
    assert len(one) == 28 and all(torch.equal(one[name], other[name]) for name in other)
