"""Mask files: the masks of a pruned model without its weights, one bit a weight, in NumPy's .npz format.

The file holds one array for each pruned weight. The key is the Hugging Face parameter name and `.mask`, for example
`model.layers.0.self_attn.q_proj.weight.mask`. The value is `numpy.packbits` of the boolean mask flattened in row-major order, uint8
[ceil(out * in / 8)]. The mask has the shape of its parameter: [out, in], but [in, out] for the `Conv1D` weights of GPT-2, so that
the blocks of M run down the columns there. The authors of MaskLLM publish their masks in this format.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from maskllm.errors import MaskLLMError, whole_message
from maskllm.files import atomic_file, check_not_lfs_pointer
from maskllm.huggingface.hub import download

SUFFIX = ".mask"

PUBLISHED = "mask_compressed.npz"
"""The name of the mask file in the authors' repositories on the hub."""

_PICKLES = (".pt", ".pth", ".bin", ".pkl")


def write_mask_file(path: str | os.PathLike, masks: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write the masks, given as pairs of a parameter's name and a bool tensor of the parameter's shape.

    One mask is in memory at a time. The file appears complete or not at all.
    """
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, mask in masks:
            bits = np.packbits(mask.detach().cpu().numpy().astype(bool))
            with archive.open(f"{name}{SUFFIX}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, bits, allow_pickle=False)


def apply_mask_file(path: str | os.PathLike, weights: Mapping[str, torch.Tensor]) -> None:
    """Set to zero, in place, the weights that the mask file removes. `weights` maps parameter names to tensors.

    Raises MaskLLMError if the file cannot be read, and naming the weight if it has no mask, a mask has no weight, or a mask has the
    wrong dtype or size for its weight. All checks come before the first weight changes.
    """
    with _opened(path) as archive:
        _check(path, archive, weights)
        for name, weight in tqdm(weights.items(), desc="apply masks", unit="matrix", disable=None, leave=False):
            mask = np.unpackbits(archive[name + SUFFIX], count=weight.numel()).view(bool).reshape(weight.shape)
            weight.masked_fill_(torch.from_numpy(~mask).to(weight.device), 0)


def find_mask_file(path_or_id: str | os.PathLike) -> Path:
    """The mask file at a path or in a directory, or downloaded from the repository with this id on the Hugging Face hub.

    A path on disk goes before a hub id. In a directory or repository it is PUBLISHED, or else the only .npz file. Raises
    MaskLLMError if there is no such file or if it is not a mask file. This is quick: call it before a model is loaded.
    """
    path = Path(path_or_id)
    if not path.exists() and path.suffix not in _PICKLES and path.suffix != ".npz":
        path = download(str(path_or_id), "mask file", ["*.npz"])
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if (path / PUBLISHED) in found:
            found = [path / PUBLISHED]
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none; a .pt file is a pickle and is not read"
            raise MaskLLMError(f"{path_or_id}: wanted {PUBLISHED} or one other .npz mask file in it, found {names}")
        (path,) = found
    with _opened(path):
        return path


def _check_not_pickle(path: Path) -> None:
    """Raise MaskLLMError if `path` is what `torch.save` or `pickle.dump` writes, whatever its name."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = any(name.endswith("data.pkl") for name in archive.namelist())
    else:
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"
    if pickled or path.suffix in _PICKLES:
        raise MaskLLMError(
            f"{path}: is a pickle, which can run code when read, so it is not read; use the .npz file with the same masks, or write "
            "one: masks = torch.load(F, weights_only=True), then maskllm.export.mask_file.write_mask_file(F.npz, masks.items())"
        )


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[np.lib.npyio.NpzFile]:
    """A block that reads the mask file `path`. An error in reading it becomes a MaskLLMError that names the file."""
    path = Path(path)
    if not path.is_file():
        raise MaskLLMError(f"{path}: no such mask file")
    try:
        check_not_lfs_pointer(path)
        _check_not_pickle(path)
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise MaskLLMError(f"{path}: a single array, wanted an .npz mask file")
        with archive:
            yield archive
    except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # zipfile raises RuntimeError if damaged flags ask for a password or for a compression method that it does not know.
        reason = whole_message(error)
        raise MaskLLMError(f"{path}: not a readable .npz mask file ({reason})") from error


def _check(path: str | os.PathLike, archive: np.lib.npyio.NpzFile, weights: Mapping[str, torch.Tensor]) -> None:
    expected = {name + SUFFIX for name in weights}
    for what, names in (("no mask for", expected - set(archive.files)), ("mask of unknown weight", set(archive.files) - expected)):
        if names:
            shown = sorted(names)[0]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise MaskLLMError(f"{path}: {what} {shown.removesuffix(SUFFIX)}{more}; the file belongs to another model")
    for name, weight in weights.items():
        bits, size = archive[name + SUFFIX], -(-weight.numel() // 8)
        if bits.dtype != np.uint8 or bits.shape != (size,):
            raise MaskLLMError(
                f"{path}: the mask of {name} is {bits.dtype} {list(bits.shape)}, wanted uint8 [{size}] for {list(weight.shape)} "
                "weights"
            )
