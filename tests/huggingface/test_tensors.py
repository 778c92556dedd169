"""Which files of a directory are read, compared with what transformers loads from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import resolve
from maskllm.errors import MaskLLMError
from maskllm.export.huggingface import export
from maskllm.huggingface.loading import load_hf_model
from maskllm.huggingface.tensors import INDEX, SINGLE, HFTensors
from tests.conftest import LFS_POINTER
from tests.families.tiny import write_tiny

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def two_sets(tmp_path) -> Path:
    """A single file with one model beside an older index, whose shards hold another: all weights times 2."""
    path = tmp_path / "hf"
    model = write_tiny("llama3", path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    model.save_pretrained(path, max_shard_size="40KB")
    assert (path / SINGLE).exists()
    return path


def read_by_all(path: Path, tmp_path: Path) -> torch.Tensor:
    """The weight DOWN, which convert and evaluate must read alike, and as transformers does."""
    convert(path, tmp_path / "dense")
    converted = resolve(tmp_path / "dense").tensors["decoder.layers.0.mlp.linear_fc2.weight"].load()
    evaluated = load_hf_model(path, device=torch.device("cpu")).get_parameter(DOWN)
    assert torch.equal(converted, evaluated)
    return converted


def test_of_two_sets_the_single_file_is_read_and_the_other_named(two_sets, tmp_path, capsys):
    theirs = AutoModelForCausalLM.from_pretrained(two_sets).get_parameter(DOWN)
    capsys.readouterr()
    assert torch.equal(read_by_all(two_sets, tmp_path), theirs)
    assert torch.equal(theirs, load_file(two_sets / SINGLE)[DOWN])
    lines = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    shards = sorted(file.name for file in two_sets.glob("model-*.safetensors"))
    assert (
        lines
        == [
            f"{two_sets}: reads {SINGLE}, as transformers does; other weights are there and ignored: {shards[0]} and "
            f"{len(shards) - 1} more"
        ]
        * 2
    )  # convert and evaluate


def test_the_file_that_the_config_names_goes_first(two_sets, tmp_path):
    config = json.loads((two_sets / "config.json").read_text())
    (two_sets / "config.json").write_text(json.dumps(config | {"transformers_weights": INDEX}))
    theirs = AutoModelForCausalLM.from_pretrained(two_sets)
    assert torch.equal(read_by_all(two_sets, tmp_path), theirs.get_parameter(DOWN))
    assert torch.equal(theirs.get_parameter(DOWN), 2 * load_file(two_sets / SINGLE)[DOWN])
    export(tmp_path / "dense", tmp_path / "back")
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits, theirs(tokens).logits)
    for name in ("../a.safetensors", "a.bin", 3, "gone.safetensors"):
        (two_sets / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        with pytest.raises(MaskLLMError, match="transformers_weights"):
            HFTensors(two_sets)


def test_one_set_of_weights_is_read_without_a_word(two_sets, capsys):
    (two_sets / SINGLE).unlink()
    assert HFTensors(two_sets).names
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("place", [0, -1])
def test_of_two_copies_in_shards_the_index_decides(place, tmp_path):
    """transformers takes the last file's copy, whatever the index says."""
    model = write_tiny("llama3", tmp_path / "hf")
    (tmp_path / "hf" / SINGLE).unlink()
    model.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    stale = shards[place]
    owner = json.loads((tmp_path / "hf" / INDEX).read_text())["weight_map"][DOWN]
    assert owner != stale.name
    save_file(load_file(stale) | {DOWN: torch.zeros(32, 48)}, stale, metadata={"format": "pt"})
    assert torch.equal(read_by_all(tmp_path / "hf", tmp_path), model.get_parameter(DOWN))


@pytest.mark.parametrize("name", [SINGLE, INDEX, "model-00002-of-00002.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_told_by_name(name, tmp_path):
    path = tmp_path / "hf"
    model = write_tiny("llama3", path)
    if name != SINGLE:
        (path / SINGLE).unlink()
        model.save_pretrained(path, max_shard_size="60KB")
    (path / name).write_text(LFS_POINTER)
    message = f"{name}: is a git-lfs pointer, not the file itself; run `git lfs pull`"
    with pytest.raises(MaskLLMError, match=message):
        convert(path, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    if name not in ("config.json", "tokenizer.json"):
        with pytest.raises(MaskLLMError, match=message):
            load_hf_model(path, device=torch.device("cpu"))


def test_pickled_weights_that_are_a_git_lfs_pointer_are_named(tmp_path):
    write_tiny("llama3", tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / "pytorch_model.bin").write_text(LFS_POINTER)
    with pytest.raises(MaskLLMError, match=r"pytorch_model\.bin: is a git-lfs pointer"):
        load_hf_model(tmp_path, device=torch.device("cpu"))
