"""Mask files, compared with what NumPy reads and writes; weights that they are applied to; files that do not fit."""

from __future__ import annotations

import pickle
import re

import huggingface_hub
import numpy as np
import pytest
import torch

from maskllm.errors import MaskLLMError
from maskllm.huggingface.mask_file import find_mask_file, open_mask_file, write_mask_file
from tests.conftest import LFS_POINTER

NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"]


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in zip(NAMES, [(8, 12), (3, 7)], strict=True)}


@pytest.fixture
def masks(weights) -> dict[str, torch.Tensor]:
    return {name: torch.rand(weight.shape) > 0.5 for name, weight in weights.items()}


def save_as_the_authors_do(path, masks) -> None:
    np.savez_compressed(path, **{f"{name}.mask": np.packbits(mask.numpy().flatten()) for name, mask in masks.items()})


def test_files_are_what_savez_compressed_writes(tmp_path, masks):
    write_mask_file(tmp_path / "ours.npz", iter(masks.items()))
    save_as_the_authors_do(tmp_path / "theirs.npz", masks)
    ours, theirs = np.load(tmp_path / "ours.npz"), np.load(tmp_path / "theirs.npz")
    assert ours.files == theirs.files == [f"{name}.mask" for name in NAMES]
    for key in theirs.files:
        assert ours[key].dtype == theirs[key].dtype
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_masked_weights_become_zero_and_the_others_keep_their_values(tmp_path, weights, masks):
    before = {name: weight.clone() for name, weight in weights.items()}
    weights[NAMES[1]][0, 0] = before[NAMES[1]][0, 0] = float("nan")
    masks[NAMES[1]][0, 0] = False
    save_as_the_authors_do(tmp_path / "masks.npz", masks)
    open_mask_file(tmp_path / "masks.npz").apply(weights)
    for name, weight in weights.items():
        assert torch.equal(weight[masks[name]], before[name][masks[name]])
        assert (weight[~masks[name]] == 0).all()


def arrays(masks: dict[str, torch.Tensor], case: str) -> dict[str, np.ndarray]:
    packed = {f"{name}.mask": np.packbits(mask.numpy()) for name, mask in masks.items()}
    first, second = packed
    return {
        "missing": {first: packed[first]},
        "extra": packed | {"lm_head.weight.mask": packed[first]},
        "short": packed | {second: packed[second][:-1]},
        "unpacked": packed | {first: masks[NAMES[0]].numpy()},
        "pickled": packed | {first: np.array([{"a": 1}], dtype=object)},
    }[case]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", f"no mask for {NAMES[1]}"),
        ("extra", "mask of unknown weight lm_head.weight"),
        ("short", rf"the mask of {NAMES[1]} is uint8 \[2\], wanted uint8 \[3\] for \[3, 7\] weights"),
        ("unpacked", rf"the mask of {NAMES[0]} is bool \[8, 12\], wanted uint8 \[12\]"),
        ("pickled", "not a readable .npz mask file"),
    ],
)
def test_masks_that_do_not_fit_are_named_and_nothing_is_changed(tmp_path, weights, masks, case, message):
    np.savez_compressed(tmp_path / "masks.npz", **arrays(masks, case))
    before = {name: weight.clone() for name, weight in weights.items()}
    with pytest.raises(MaskLLMError, match=message) as error:
        open_mask_file(tmp_path / "masks.npz").apply(weights)
    assert str(error.value).startswith(str(tmp_path / "masks.npz"))
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_a_file_that_is_not_a_mask_file_is_named(tmp_path, weights, masks):
    np.save(tmp_path / "single.npy", np.zeros(3, np.uint8))
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "empty.npz").write_text("")
    save_as_the_authors_do(tmp_path / "whole.npz", masks)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-60])
    for name in ("single.npy", "text.npz", "empty.npz", "cut.npz", "missing.npz"):
        with pytest.raises(MaskLLMError, match=name) as error:
            open_mask_file(tmp_path / name).apply(weights)
        assert "\n" not in str(error.value)


def snapshot(monkeypatch, folder, *names) -> None:
    """Let the hub give `folder` with empty mask files of these names."""
    folder.mkdir()
    for name in names:
        np.savez_compressed(folder / name)

    def snapshot_download(repo_id, *, allow_patterns, **_) -> str:
        assert (repo_id, allow_patterns) == ("Owner/LLaMA-2-7B-MaskLLM-C4", ["*.npz"])
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["mask_compressed.npz"], "mask_compressed.npz"),
        (["a.npz", "mask_compressed.npz"], "mask_compressed.npz"),
        (["m.npz"], "m.npz"),
    ],
)
def test_a_hub_id_gives_the_mask_file_in_its_repository(tmp_path, monkeypatch, names, found):
    snapshot(monkeypatch, tmp_path / "snapshot", *names)
    assert find_mask_file("Owner/LLaMA-2-7B-MaskLLM-C4") == tmp_path / "snapshot" / found
    assert find_mask_file(tmp_path / "snapshot") == tmp_path / "snapshot" / found  # a clone of it
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "Owner" / "LLaMA-2-7B-MaskLLM-C4"
    here.parent.mkdir()
    np.savez_compressed(here.parent / "file.npz")
    (here.parent / "file.npz").rename(here)
    assert find_mask_file("Owner/LLaMA-2-7B-MaskLLM-C4").resolve() == here  # a path on disk goes first


@pytest.mark.parametrize(
    ("names", "found"), [([], "none; a .pt file is a pickle and is not read"), (["a.npz", "b.npz"], "a.npz, b.npz")]
)
def test_a_repository_without_one_mask_file_is_told(tmp_path, monkeypatch, names, found):
    snapshot(monkeypatch, tmp_path / "snapshot", *names)
    words = f"^Owner/LLaMA-2-7B-MaskLLM-C4: wanted mask_compressed.npz or one other .npz mask file in it, found {found}$"
    with pytest.raises(MaskLLMError, match=words):
        find_mask_file("Owner/LLaMA-2-7B-MaskLLM-C4")


def test_a_mask_that_the_hub_does_not_give_and_one_that_is_no_hub_id(tmp_path):
    with pytest.raises(MaskLLMError, match=r"^Owner/masks: no such mask file, and the hub does not give it: it cannot be reached"):
        find_mask_file("Owner/masks")
    for name in ("masks.npz", "owner/masks.npz", "masks.pt"):
        with pytest.raises(MaskLLMError, match=f"^{name}: no such mask file$"):
            find_mask_file(name)


def test_a_pickle_is_refused_whatever_its_name(tmp_path, masks):
    torch.save(masks, tmp_path / "masks.pt")
    torch.save(masks, tmp_path / "zipped.npz")
    torch.save(masks, tmp_path / "old.npz", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.npz").write_bytes(pickle.dumps({name: mask.numpy() for name, mask in masks.items()}))
    for name in ("masks.pt", "zipped.npz", "old.npz", "plain.npz"):
        with pytest.raises(
            MaskLLMError, match=rf"{name}: is a pickle, which can run code when read, so it is not read; use the \.npz"
        ):
            find_mask_file(tmp_path / name)


def test_what_the_refusal_of_a_pickle_advises_works(tmp_path, weights, masks):
    torch.save(masks, tmp_path / "masks.pt")
    loaded = torch.load(tmp_path / "masks.pt", weights_only=True)
    write_mask_file(tmp_path / "masks.npz", loaded.items())
    before = {name: weight.clone() for name, weight in weights.items()}
    open_mask_file(tmp_path / "masks.npz").apply(weights)
    assert all(torch.equal(weights[name], before[name] * masks[name]) for name in NAMES)


def test_a_git_lfs_pointer_is_no_mask_file(tmp_path):
    (tmp_path / "m.npz").write_text(LFS_POINTER)
    with pytest.raises(MaskLLMError, match=r"m\.npz: is a git-lfs pointer, not the file itself"):
        find_mask_file(tmp_path)


def test_a_failed_write_leaves_no_file(tmp_path, masks):
    def failing():
        yield from masks.items()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_mask_file(tmp_path / "masks.npz", failing())
    assert not list(tmp_path.iterdir())


def test_a_mask_file_with_damaged_flags_is_named(tmp_path):
    path = tmp_path / "m.npz"
    np.savez(path, **{"w.mask": np.zeros(1, np.uint8)})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 8] |= 1  # the flag of an encrypted entry
    path.write_bytes(data)
    with pytest.raises(MaskLLMError, match=r"m\.npz: not a readable \.npz mask file"):
        open_mask_file(path).apply({"w": torch.zeros(8)})


def test_a_difference_holds_what_changed_and_the_name_of_its_base(tmp_path, weights, masks):
    save_as_the_authors_do(tmp_path / "general.npz", masks)
    changed = {name: mask.clone() for name, mask in masks.items()}
    changed[NAMES[1]][2, 6] ^= True
    write_mask_file(tmp_path / "domain.npz", changed.items(), open_mask_file(tmp_path / "general.npz"))
    with np.load(tmp_path / "domain.npz") as file:
        assert file.files == ["base_name", "base_sha256", *(f"{name}.mask_xor" for name in NAMES)]
        assert str(file["base_name"]) == "general.npz"
        assert not file[f"{NAMES[0]}.mask_xor"].any()
        np.testing.assert_array_equal(np.unpackbits(file[f"{NAMES[1]}.mask_xor"]).nonzero()[0], [20])
    write_mask_file(tmp_path / "again.npz", masks.items())  # other bytes, the same masks
    read = open_mask_file(tmp_path / "domain.npz", tmp_path / "again.npz")
    assert all(torch.equal(read.mask(name, tuple(changed[name].shape)), changed[name]) for name in NAMES)
    with pytest.raises(MaskLLMError, match=f"general.npz: no mask for {NAMES[1]};"):
        save_as_the_authors_do(tmp_path / "general.npz", {NAMES[0]: masks[NAMES[0]]})
        write_mask_file(tmp_path / "no.npz", changed.items(), open_mask_file(tmp_path / "general.npz"))
    assert not (tmp_path / "no.npz").exists()


def test_a_damaged_difference_is_named(tmp_path, masks):
    save_as_the_authors_do(tmp_path / "general.npz", masks)
    write_mask_file(tmp_path / "domain.npz", masks.items(), open_mask_file(tmp_path / "general.npz"))
    arrays = dict(np.load(tmp_path / "domain.npz"))
    for key, value, message in (
        (f"{NAMES[0]}.mask_xor", np.zeros(1, np.uint8), f"the change of {NAMES[0]} is uint8 [1], but "),
        ("extra", np.zeros(1, np.uint8), "entry extra is no mask"),
    ):
        np.savez(tmp_path / "damaged.npz", **(arrays | {key: value}))
        with pytest.raises(MaskLLMError, match=re.escape(message)):
            open_mask_file(tmp_path / "damaged.npz", tmp_path / "general.npz").apply(
                {name: mask.float() for name, mask in masks.items()}
            )
