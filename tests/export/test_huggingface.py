"""Export: the original comes back bit for bit, and no matrix that breaks its pattern is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.info import CheckpointInfo
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.huggingface import export
from maskllm.export.trim import trim
from maskllm.families.registry import parameter_map
from maskllm.huggingface.weights_hash import weights_sha256
from maskllm.patterns import pack_mask
from tests.checkpoints.changed import write_changed
from tests.families.tiny import CONFIGS, write_tiny


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors in a Hugging Face directory."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.bfloat16) for name in CONFIGS), ("llama3", torch.float32), ("gpt2", torch.float16)],
)
def test_export_undoes_convert_bit_for_bit(name, dtype, tmp_path):
    write_tiny(name, tmp_path / "hf", dtype)
    convert(tmp_path / "hf", tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "back", max_shard_size="10KB")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert set(before) == set(after)
    assert [key for key in before if not same_bits(before[key], after[key])] == []
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()

    again, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values()), loading
    assert again.dtype == dtype
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits)


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A folder with a tiny LLaMA 3 as hf, dense, pruned with random 2:4 masks, and trimmed. Only read it."""
    path = tmp_path_factory.mktemp("stages")
    write_tiny("llama3", path / "hf", torch.bfloat16)
    convert(path / "hf", path / "dense")
    dense = resolve(path / "dense")
    generator = torch.Generator().manual_seed(0)
    bits = {}
    for mapping in parameter_map(dense.model_config):
        if mapping.linear is not None:
            scores = torch.rand(dense.tensors[mapping.megatron].shape, generator=generator)
            bits[f"{mapping.linear}.mask_bits"] = pack_mask(scores.unflatten(1, (-1, 4)).argsort(-1).lt(2).flatten(1))
    write_changed(dense, path / "pruned", bits, CheckpointInfo("pruned", "x", "2:4", "magnitude"))
    trim(path / "pruned", path / "trimmed")
    return path


PRUNED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_pruned_matrices_keep_two_of_four_and_other_tensors_are_unchanged(stages, tmp_path):
    arguments = ["--load", str(stages / "trimmed"), "--output", str(tmp_path / "sparse"), "--json", str(tmp_path / "report.json")]
    assert main(["export", *arguments]) == 0
    before, after = tensors_of(stages / "hf"), tensors_of(tmp_path / "sparse")
    pruned = {key for key in before if key.split(".")[-2] in PRUNED}
    assert len(pruned) == 2 * 7
    for key in before:
        if key not in pruned:
            assert same_bits(before[key], after[key]), key
            continue
        kept = after[key] != 0
        assert kept.unflatten(1, (-1, 4)).sum(-1).eq(2).all(), key
        assert torch.equal(after[key][kept], before[key][kept]), key
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("load") == str(stages / "trimmed")
    assert report.pop("weights_sha256") == weights_sha256(tmp_path / "sparse")
    assert report.pop("seconds") > 0 and report.pop("peak_memory_bytes") > 0
    assert report == {
        "parameters": sum(tensor.numel() for tensor in before.values()),
        "pruned_parameters": sum(before[key].numel() for key in pruned),
        "zeros": sum(before[key].numel() for key in pruned) // 2,
        "bytes": sum(tensor.nbytes for tensor in before.values()),
        "trained_weights": False,
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert (model.model.layers[1].mlp.up_proj.weight == 0).float().mean() == 0.5


def test_the_original_times_the_mask_file_is_the_exported_model(stages, tmp_path):
    export(stages / "trimmed", tmp_path / "sparse", mask_file=tmp_path / "masks.npz")
    dense, sparse = tensors_of(stages / "hf"), tensors_of(tmp_path / "sparse")
    with np.load(tmp_path / "masks.npz", allow_pickle=False) as masks:
        assert set(masks.files) == {f"{key}.mask" for key in dense if key.split(".")[-2] in PRUNED}
        for key in masks.files:
            name = key.removesuffix(".mask")
            mask = np.unpackbits(masks[key], count=dense[name].numel()).reshape(dense[name].shape)
            assert torch.equal(dense[name] * torch.from_numpy(mask), sparse[name]), name


def test_the_output_appears_only_after_the_mask_file(stages, tmp_path, monkeypatch):
    with pytest.raises(MaskLLMError, match=r"--mask-file .*masks\.npz: lies in --output .*sparse"):
        export(stages / "trimmed", tmp_path / "sparse", mask_file=tmp_path / "sparse" / "masks.npz")

    def killed(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskllm.export.huggingface.write_mask_file", killed)
    with pytest.raises(KeyboardInterrupt):
        export(stages / "trimmed", tmp_path / "sparse", mask_file=tmp_path / "masks.npz")
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize(
    ("row", "column", "words"),
    # Rows of the first group in the fused tensor: 0 to 15 two query heads, 16 to 23 a key head, 24 to 31 a value head.
    [(25, 5, "model.layers.1.self_attn.v_proj.weight: row 1, block 1 (columns 4 to 7) has 3 non-zeros"),
     (16, 0, "model.layers.1.self_attn.k_proj.weight: row 0, block 0")],
)  # fmt: skip
def test_a_matrix_that_breaks_the_pattern_is_not_written(row, column, words, stages, tmp_path, capsys):
    checkpoint = resolve(stages / "trimmed")
    key = "decoder.layers.1.self_attention.linear_qkv.weight"
    weight = checkpoint.tensors[key].load()
    block = weight[row, column // 4 * 4 : column // 4 * 4 + 4]
    block[block == 0] = torch.tensor([1.0, 0.0], dtype=weight.dtype)  # a third non-zero
    write_changed(checkpoint, tmp_path / "bad", {key: weight})
    assert main(["export", "--load", str(tmp_path / "bad"), "--output", str(tmp_path / "sparse")]) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "sparse").exists()


def test_a_weight_outside_of_its_mask_is_not_written(stages, tmp_path):
    checkpoint = resolve(stages / "trimmed")
    key = "decoder.layers.0.mlp.linear_fc2.weight"
    moved = checkpoint.tensors[key].load().unflatten(1, (-1, 4)).roll(1, -1).flatten(1)  # still 2:4
    write_changed(checkpoint, tmp_path / "bad", {key: moved})
    with pytest.raises(
        MaskLLMError, match=r"model\.layers\.0\.mlp\.down_proj\.weight has \d+ non-zero weights that its mask removes"
    ):
        export(tmp_path / "bad", tmp_path / "sparse")


def test_the_config_states_the_dtype_the_tensors_have(tmp_path):
    write_tiny("llama2", tmp_path / "hf", torch.bfloat16)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config.pop("dtype", None)
    path.write_text(json.dumps(config | {"torch_dtype": "float16"}))
    convert(tmp_path / "hf", tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}


def test_a_wrong_stage_output_or_size_is_refused(stages, tmp_path):
    with pytest.raises(MaskLLMError, match="is a pruned checkpoint; write its masks into the weights first"):
        export(stages / "pruned", tmp_path / "sparse")
    with pytest.raises(MaskLLMError, match="is a dense checkpoint, which has no masks"):
        export(stages / "dense", tmp_path / "sparse", mask_file=tmp_path / "masks.npz")


def test_a_base_of_another_model_and_one_without_a_mask_file_are_refused(stages, tmp_path):
    np.savez(tmp_path / "other.npz", **{"lm_head.weight.mask": np.zeros(3, np.uint8)})
    with pytest.raises(MaskLLMError, match=r"other\.npz: no mask for model\.layers\.0"):
        export(stages / "trimmed", tmp_path / "sparse", mask_file=tmp_path / "masks.npz", mask_base=tmp_path / "other.npz")
    with pytest.raises(MaskLLMError, match="--mask-base: says how to write --mask-file"):
        export(stages / "trimmed", tmp_path / "sparse", mask_base=tmp_path / "other.npz")
    assert not (tmp_path / "sparse").exists() and not (tmp_path / "masks.npz").exists()
    with pytest.raises(MaskLLMError, match="hf exists and is not an empty directory"):
        export(stages / "trimmed", stages / "hf")
    for size in ("5 apples", "-5GB", "0GB", "0.0 kb", "infGB", "nanGB", "5", "1.2.3GB", "9" * 400 + "GB"):
        with pytest.raises(MaskLLMError, match=f"--max-shard-size {size}: wanted a positive size"):
            export(stages / "trimmed", tmp_path / "sparse", max_shard_size=size)
    assert not (tmp_path / "sparse").exists()
