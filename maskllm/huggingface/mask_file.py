"""Mask files: the masks of a pruned model without its weights, one bit a weight, in NumPy's .npz format.

The file holds one array for each pruned weight. The key is the Hugging Face parameter name and `.mask`, for example
`model.layers.0.self_attn.q_proj.weight.mask`. The value is `numpy.packbits` of the boolean mask flattened in row-major order, uint8
[ceil(out * in / 8)]. The mask has the shape of its parameter: [out, in], but [in, out] for the `Conv1D` weights of GPT-2, so that
the blocks of M run down the columns there. The authors of MaskLLM publish their masks in this format.

A difference holds masks as changes to those of another mask file, its base: under NAME and `.mask_xor` the packed bits XOR the
base's, which compresses well if few blocks differ, and the base's file name and digest under `base_name` and `base_sha256`. No
entry ends in `.mask`, so a reader that does not know differences finds no masks instead of wrong ones.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from maskllm.errors import MaskLLMError, whole_message
from maskllm.files import atomic_file, check_not_lfs_pointer
from maskllm.huggingface.hub import download

SUFFIX = ".mask"
XOR_SUFFIX = ".mask_xor"
BASE_NAME, BASE_SHA256 = "base_name", "base_sha256"
"""The entries of a difference that name its base."""

PUBLISHED = "mask_compressed.npz"
"""The name of the mask file in the authors' repositories on the hub."""

_PICKLES = (".pt", ".pth", ".bin", ".pkl")


@dataclass(frozen=True)
class MaskFile:
    """A mask file for reading, one mask at a time. `open_mask_file` makes it."""

    path: Path
    base: MaskFile | None = None
    """The file that this one is a difference to; None if it holds the masks themselves."""

    @functools.cached_property
    def names(self) -> list[str]:
        """The names of the parameters that have masks. Raises MaskLLMError if an entry is no mask."""
        with _opened(self.path) as archive:
            entries = [entry for entry in archive.files if self.base is None or entry not in (BASE_NAME, BASE_SHA256)]
        for entry in entries:
            if not entry.endswith(self._suffix):
                raise MaskLLMError(f"{self.path}: entry {entry} is no mask; wanted a parameter's name and {self._suffix}")
        return [entry.removesuffix(self._suffix) for entry in entries]

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the masks: of each name, in sorted order, a zero byte and the packed bits. It does not depend on how they
        are stored, so a difference has the digest of the whole file with the same masks. It reads the whole file."""
        digest = hashlib.sha256()
        for name in sorted(self.names):
            digest.update(name.encode() + b"\0")
            digest.update(self._bits(name).tobytes())
        return digest.hexdigest()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise MaskLLMError naming a parameter of `shapes` without a mask, a mask without one, or one of another dtype or size."""
        for what, names in (
            ("no mask for", shapes.keys() - set(self.names)),
            ("mask of unknown weight", set(self.names) - shapes.keys()),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise MaskLLMError(f"{self.path}: {what} {min(names)}{more}; the file belongs to another model")
        for name, shape in shapes.items():
            self.packed(name, shape)

    def mask(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The mask of a parameter, bool in the parameter's shape. Raises MaskLLMError if it is missing or has another dtype or size."""
        return torch.from_numpy(np.unpackbits(self.packed(name, shape), count=_numel(shape)).view(bool).reshape(shape))

    def packed(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The bits of `mask` as the file format packs them, uint8 [ceil(numel / 8)]. Raises MaskLLMError as `mask` does."""
        bits, size = self._bits(name), -(-_numel(shape) // 8)
        if bits.dtype != np.uint8 or bits.shape != (size,):
            raise MaskLLMError(
                f"{self.path}: the mask of {name} is {bits.dtype} {list(bits.shape)}, wanted uint8 [{size}] for {list(shape)} weights"
            )
        return bits

    def apply(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set to zero, in place, the weights that the masks remove. `weights` maps parameter names to tensors.

        Raises MaskLLMError as `check` does, before the first weight changes.
        """
        self.check({name: tuple(weight.shape) for name, weight in weights.items()})
        for name, weight in tqdm(weights.items(), desc="apply masks", unit="matrix", disable=None, leave=False):
            weight.masked_fill_(~self.mask(name, tuple(weight.shape)).to(weight.device), 0)

    @property
    def _suffix(self) -> str:
        return SUFFIX if self.base is None else XOR_SUFFIX

    def _bits(self, name: str) -> np.ndarray:
        """The packed bits of a mask as they are stored, of any dtype and shape."""
        if name not in self.names:
            raise MaskLLMError(f"{self.path}: no mask for {name}; the file belongs to another model")
        with _opened(self.path) as archive:
            bits = archive[name + self._suffix]
        if self.base is None:
            return bits
        other = self.base._bits(name)
        if (bits.dtype, bits.shape) != (other.dtype, other.shape) or bits.dtype != np.uint8:
            raise MaskLLMError(
                f"{self.path}: the change of {name} is {bits.dtype} {list(bits.shape)}, but {self.base.path} has {other.dtype} "
                f"{list(other.shape)}; the file is damaged"
            )
        return bits ^ other


def open_mask_file(path_or_id: str | os.PathLike, base: str | os.PathLike | None = None) -> MaskFile:
    """Open a mask file, or a difference with its `base`; both are as `find_mask_file` takes them.

    It reads the whole base, to compare its digest, and no other masks: call it before a model is loaded. Raises MaskLLMError if a
    file cannot be found or read, a difference comes without its base or with another, or if a base comes with a whole file.
    """
    path = find_mask_file(path_or_id)
    wanted = _base_of(path)
    if wanted is None:
        if base is not None:
            raise MaskLLMError(f"{path}: holds whole masks, not a difference; leave out --mask-base {base}")
        return MaskFile(path)
    name, digest = wanted
    if base is None:
        raise MaskLLMError(
            f"{path}: is a difference to the mask file {name} (SHA-256 of its masks {digest}); give that one as --mask-base"
        )
    opened = open_base(base)
    if opened.digest != digest:
        raise MaskLLMError(
            f"--mask-base {opened.path}: its masks have the SHA-256 {opened.digest}, but {path} is a difference to {name} with {digest}; "
            "give that file"
        )
    return MaskFile(path, opened)


def open_masks(mask: str | os.PathLike | None, base: str | os.PathLike | None = None) -> MaskFile | None:
    """`open_mask_file` for the options --mask and --mask-base, or None without --mask. Raises MaskLLMError if there is a base only."""
    if mask is None and base is not None:
        raise MaskLLMError("--mask-base: belongs to a mask file that is a difference; give --mask too, or leave it out")
    return None if mask is None else open_mask_file(mask, base)


def open_base(path_or_id: str | os.PathLike) -> MaskFile:
    """Open the mask file that another one is, or will be, a difference to. Raises MaskLLMError if it is itself a difference."""
    path = find_mask_file(path_or_id)
    if (base := _base_of(path)) is not None:
        raise MaskLLMError(f"--mask-base {path}: is itself a difference, to {base[0]}; wanted a mask file with whole masks")
    return MaskFile(path)


def write_mask_file(path: str | os.PathLike, masks: Iterable[tuple[str, torch.Tensor]], base: MaskFile | None = None) -> None:
    """Write the masks, given as pairs of a parameter's name and a bool tensor of the parameter's shape; as a difference to `base`.

    One mask is in memory at a time. The file appears complete or not at all. Raises MaskLLMError if `base` lacks one of the masks or
    has it with another size.
    """
    suffix = SUFFIX if base is None else XOR_SUFFIX
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        if base is not None:
            _write_entry(archive, BASE_NAME, np.array(base.path.name))
            _write_entry(archive, BASE_SHA256, np.array(base.digest))
        for name, mask in masks:
            bits = np.packbits(mask.detach().cpu().numpy().astype(bool))
            _write_entry(archive, name + suffix, bits if base is None else bits ^ base.packed(name, tuple(mask.shape)))


def _write_entry(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array(entry, values, allow_pickle=False)


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


def _base_of(path: Path) -> tuple[str, str] | None:
    """The name and the digest of the base if the file is a difference, else None."""
    with _opened(path) as archive:
        if BASE_SHA256 not in archive.files:
            return None
        return str(archive[BASE_NAME]) if BASE_NAME in archive.files else "another file", str(archive[BASE_SHA256])


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


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
            "one: masks = torch.load(F, weights_only=True), then maskllm.huggingface.mask_file.write_mask_file(F.npz, masks.items())"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """A block that reads the mask file `path`. An error in reading it becomes a MaskLLMError that names the file."""
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
        # numpy takes a file that is neither a zip nor an array for a pickle, and would advise to load it as one.
        reason = "it is no zip file" if isinstance(error, ValueError) and not zipfile.is_zipfile(path) else whole_message(error)
        raise MaskLLMError(f"{path}: not a readable .npz mask file ({reason})") from error
