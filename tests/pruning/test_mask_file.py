"""`maskllm prune --method mask-file`: the masks of a mask file, whole or a difference, become the masks of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.huggingface.mask_file import open_mask_file
from maskllm.patterns import Pattern, unpack_mask
from maskllm.pruning import PruneSettings, prune_hf
from tests.families.tiny import write_tiny
from tests.pruning.pruned import calibrated, hf_masks, hf_weights


def run(verb: str, *arguments: object) -> int:
    return main([verb, *map(str, arguments)])


def export_masks(pruned: Path, folder: Path, *options: object) -> Path:
    """Write FOLDER/masks.npz, the masks of a pruned checkpoint."""
    assert run("trim", "--load", pruned, "--output", folder / "trimmed") == 0
    assert (
        run("export", "--load", folder / "trimmed", "--output", folder / "hf", "--mask-file", folder / "masks.npz", *options) == 0
    )
    return folder / "masks.npz"


@pytest.fixture(scope="module", params=["llama3", "gpt2", "phi3"])
def source(request, tmp_path_factory) -> Path:
    """A folder with a tiny model as hf and dense, its one-shot masks as pruned, and those masks in masks.npz. Only read it."""
    path = tmp_path_factory.mktemp(request.param)
    write_tiny(request.param, path / "hf-original", torch.bfloat16)
    convert(path / "hf-original", path / "dense")
    assert run("prune", "--load", path / "dense", "--output", path / "pruned", "--method", "magnitude") == 0
    export_masks(path / "pruned", path)
    return path


def same_bits(one: Path, other: Path) -> bool:
    first, second = resolve(one).tensors, resolve(other).tensors
    keys = [key for key in first if key.endswith(".mask_bits")]
    assert keys and list(first) == list(second)
    return all(torch.equal(first[key].load(), second[key].load()) for key in keys)


def test_the_masks_are_those_of_the_checkpoint_that_the_file_came_from(source, tmp_path):
    out = tmp_path / "out"
    options = ["--method", "mask-file", "--mask", source / "masks.npz", "--json", tmp_path / "report.json"]
    assert run("prune", "--load", source / "dense", "--output", out, *options) == 0
    assert same_bits(source / "pruned", out)
    before, after = hf_weights(source / "dense"), hf_weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    digest = hashlib.sha256()
    with np.load(source / "masks.npz") as masks:  # the definition, written out
        for key in sorted(masks.files):
            digest.update(key.removesuffix(".mask").encode() + b"\0" + masks[key].tobytes())
    expected = {"name": "masks.npz", "sha256": digest.hexdigest()}
    info = resolve(out).info
    assert (info.stage, info.method, info.pattern, info.details["mask_file"]) == ("pruned", "mask-file", "2:4", expected)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["method"], report["sparsity"], report["mask_file"]) == ("mask-file", "2:4", expected)


def test_with_calibration_data_the_errors_are_reported(tiny_hf, tiny_dense, tiny_pruned, tiny_dataset, tmp_path):
    file = export_masks(tiny_pruned, tmp_path)
    reports = {}
    for method, options in (("mask-file", ["--mask", file]), ("magnitude", [])):
        out = tmp_path / method
        data = calibrated(tiny_dataset, method, "--json", tmp_path / f"{method}.json", *options)
        assert run("prune", "--load", tiny_dense, "--output", out, *data) == 0
        assert same_bits(tiny_pruned, out)
        reports[method] = json.loads((tmp_path / f"{method}.json").read_text())
    assert reports["mask-file"]["layers"][3]["matrices"] == reports["magnitude"]["layers"][3]["matrices"]
    assert resolve(tmp_path / "mask-file").info.details["mask_file"]["sha256"] == open_mask_file(file).digest


def test_a_model_in_memory_takes_a_mask_file(source):
    model = AutoModelForCausalLM.from_pretrained(source / "hf-original", dtype=torch.float32)
    settings = PruneSettings("mask-file", Pattern(2, 4), mask_file=open_mask_file(source / "masks.npz"))
    result = prune_hf(model, torch.arange(32)[None], settings)
    expected = hf_masks(source / "pruned")
    transposed = "gpt2" in model.config.model_type
    assert result.masks.keys() == expected.keys()
    for name, bits in result.masks.items():
        mask = expected[name].t() if transposed else expected[name]
        assert torch.equal(unpack_mask(bits, mask.shape[1]), mask)
        assert ((model.get_parameter(name) != 0) <= expected[name]).all()


def changed(source: Path, case: str) -> dict[str, np.ndarray]:
    """The arrays of the file, changed. The second block of output 1 of the first matrix is full in case "full"."""
    with np.load(source / "masks.npz") as masks:
        arrays = dict(masks)
    first = next(iter(arrays))
    if case == "missing":
        del arrays[first]
    elif case == "extra":
        arrays["lm_head.weight.mask"] = arrays[first]
    elif case == "short":
        arrays[first] = arrays[first][:-1]
    elif case == "full":
        name, parameter = first.removesuffix(".mask"), hf_masks(source / "pruned")[first.removesuffix(".mask")]
        mask = parameter.t().clone() if name.startswith("transformer.h") else parameter.clone()
        mask[1, 4:8] = True
        arrays[first] = np.packbits((mask.t() if name.startswith("transformer.h") else mask).contiguous().numpy())
    return arrays


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "no mask for {first}; the file belongs to another model"),
        ("extra", "mask of unknown weight lm_head.weight; the file belongs to another model"),
        ("short", "the mask of {first} is uint8 ["),
        ("full", "{first}: output 1, block 1 (inputs 4 to 7) keeps 4 weights; --pattern 2:4 wants 2"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(source, tmp_path, capsys, case, message):
    arrays = changed(source, case)
    np.savez_compressed(tmp_path / "bad.npz", **arrays)
    with np.load(source / "masks.npz") as masks:
        first = masks.files[0].removesuffix(".mask")
    out = tmp_path / "out"
    assert run("prune", "--load", source / "dense", "--output", out, "--method", "mask-file", "--mask", tmp_path / "bad.npz") == 1
    assert f"maskllm prune: error: {tmp_path / 'bad.npz'}: {message.format(first=first)}" in capsys.readouterr().err
    assert not out.exists()


def test_the_pattern_is_checked(source, tmp_path, capsys):
    options = ["--load", source / "dense", "--output", tmp_path / "out", "--method", "mask-file", "--mask", source / "masks.npz"]
    assert run("prune", *options, "--pattern", "1:4") == 1
    assert "output 0, block 0 (inputs 0 to 3) keeps 2 weights; --pattern 1:4 wants 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "mask-file"], "--method mask-file needs --mask F.npz, a mask file"),
        (["--method", "magnitude", "--mask", "F"], "--mask: goes with --method mask-file only, found --method magnitude"),
        (["--method", "magnitude", "--mask-base", "F"], "--mask-base: goes with --method mask-file only, found --method magnitude"),
        (["--method", "mask-file", "--mask", "F", "--sparsity", "0.5"], "--sparsity: --method mask-file wants the file's pattern"),
        (["--method", "mask-file", "--mask", "F", "--update-weights"], "--update-weights: --method mask-file takes a mask only"),
        (
            ["--method", "mask-file", "--mask", "F", "--mask-base", "F"],
            "holds whole masks, not a difference; leave out --mask-base",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(source, tmp_path, capsys, options, message):
    options = [source / "masks.npz" if option == "F" else option for option in options]
    assert run("prune", "--load", source / "dense", "--output", tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err


def test_a_difference_is_small_and_needs_its_base(source, tmp_path, capsys):
    """The masks of the source with the first block of the first matrix turned round, as a difference to the source's."""
    arrays = changed(source, "none")
    first = next(iter(arrays))
    bits = np.unpackbits(arrays[first])
    whole = hf_masks(source / "pruned")[first.removesuffix(".mask")]
    step = whole.shape[1] if first.startswith("transformer.h") else 1  # blocks run down the columns of a Conv1D's weight
    bits[0 : 4 * step : step] ^= 1
    arrays[first] = np.packbits(bits)
    np.savez_compressed(tmp_path / "domain.npz", **arrays)
    dense, take = ["--load", source / "dense"], ["--method", "mask-file", "--mask"]
    assert run("prune", *dense, "--output", tmp_path / "domain", *take, tmp_path / "domain.npz") == 0

    base = ["--mask-base", source / "masks.npz"]
    difference = export_masks(tmp_path / "domain", tmp_path, *base)
    assert difference.stat().st_size < (tmp_path / "domain.npz").stat().st_size
    assert run("prune", *dense, "--output", tmp_path / "again", *take, difference, *base) == 0
    assert same_bits(tmp_path / "domain", tmp_path / "again")
    digests = [resolve(tmp_path / name).info.details["mask_file"]["sha256"] for name in ("domain", "again")]
    assert digests[0] == digests[1] == open_mask_file(tmp_path / "domain.npz").digest

    for others, message in (
        ([], "is a difference to the mask file masks.npz (SHA-256 of its masks "),
        (["--mask-base", tmp_path / "domain.npz"], "but {} is a difference to masks.npz with "),
        (["--mask-base", difference], "is itself a difference, to masks.npz; wanted a mask file with whole masks"),
    ):
        assert run("prune", *dense, "--output", tmp_path / "refused", *take, difference, *others) == 1
        assert message.format(difference) in capsys.readouterr().err
