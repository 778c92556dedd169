"""`maskllm verify`: whether the weights of a Hugging Face directory are what is said of them, one tensor in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from maskllm.export.pattern_search import broken_blocks, found_pattern
from maskllm.export.stored_weights import StoredWeights
from maskllm.huggingface.mask_file import MaskFile
from maskllm.huggingface.side_files import HASH_FILE
from maskllm.huggingface.weights_hash import TRAINED, StatedHash, read_hash
from maskllm.patterns import Pattern

_DENSE_ZEROS = 0.01
"""A matrix without a pattern is dense if it has at most this share of zeros."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number: the type that compares its bits."""


@dataclass(frozen=True)
class Finding:
    """Something that is not as claimed."""

    tensor: str | None
    """The tensor that it is about; None if it is about all of them."""
    what: str


@dataclass
class MatrixFacts:
    """What the weights of a matrix of the blocks show."""

    pattern: str
    """"2:4" and so on; "unstructured", or "dense" if it has almost no zeros."""
    broken_blocks: int
    """Blocks with more non-zeros than the pattern allows: none with a pattern that was found, or a few of thousands."""
    zeros: float
    """The share of zeros."""
    kept: int | None = None
    """The weights that the mask file keeps."""
    kept_zeros: int | None = None
    """How many of them are zero."""
    changed: int | None = None
    """The kept weights that do not have the bits of the dense model's. Without a mask file the kept weights are the non-zeros."""


@dataclass
class Verification:
    """The result of `verify`."""

    model: str
    directory: str
    tensors: int
    pattern: str | None
    """The pattern that was claimed."""
    mask: str | None
    dense: str | None
    weights_sha256: str = ""
    stated: StatedHash | None = None
    """What the directory says of its weights."""
    rounded: bool = False
    """Whether kept weights are stored in fewer bits than the dense model's."""
    matrices: dict[str, MatrixFacts] = field(default_factory=dict)
    compared: int = 0
    """How many tensors other than matrices of the blocks have been compared with the dense model's."""
    differing: list[str] = field(default_factory=list)
    """Those that differ."""
    findings: list[Finding] = field(default_factory=list)
    """What is not as claimed."""

    @property
    def changes(self) -> str | None:
        """Why kept weights need not be the dense model's, in words; None if they have to be."""
        if self.stated is not None and self.stated.kept_weights is not None:
            return f"{HASH_FILE} says that they were {self.stated.kept_weights}"
        return "config.json says that they are rounded" if self.rounded else None

    def lines(self) -> list[str]:
        """The result as text: a line for each thing that was checked, and one for each finding."""
        lines = [
            f"{self.directory}: {self.tensors} tensors, weights sha256 {self.weights_sha256}{self._hash_words()}",
            *self._pattern_lines(),
        ]
        if self.mask is not None and (kept := [facts for facts in self.matrices.values() if facts.kept is not None]):
            lines.append(
                f"masks of {self.mask}: compared with {_count(len(kept), 'matrix', 'matrices')}; "
                f"{sum(facts.kept_zeros for facts in kept):,} of {sum(facts.kept for facts in kept):,} kept weights are zero"
            )
        if self.dense is not None:
            lines += self._dense_lines()
        lines += [f"NOT AS CLAIMED: {finding.tensor + ': ' if finding.tensor else ''}{finding.what}" for finding in self.findings]
        lines.append("all as claimed" if not self.findings else f"{len(self.findings)} not as claimed")
        return lines

    def _hash_words(self) -> str:
        if self.stated is None:
            return f" (no {HASH_FILE} states it)"
        return f", as {HASH_FILE} states" if self.stated.weights_sha256 == self.weights_sha256 else ""

    def _pattern_lines(self) -> list[str]:
        """How many matrices have which pattern; those that differ from most of them by name."""
        if not self.matrices:
            return ["no matrices of blocks"]
        counts = Counter(facts.pattern for facts in self.matrices.values()).most_common()
        usual = counts[0][0]
        lines = [", ".join(f"{_count(count, 'matrix is', 'matrices are')} {pattern}" for pattern, count in counts)]
        for name, facts in self.matrices.items():
            if facts.broken_blocks and self.pattern is None:
                lines.append(f"{name}: {facts.pattern}, but for {_count(facts.broken_blocks, 'block')} with more non-zeros")
            elif facts.pattern != usual:
                lines.append(f"{name}: {facts.pattern}, {facts.zeros:.1%} zeros")
        return lines

    def _dense_lines(self) -> list[str]:
        compared = {name: facts for name, facts in self.matrices.items() if facts.changed is not None}
        changed = [name for name, facts in compared.items() if facts.changed]
        line = f"dense model {self.dense}: kept weights are the originals, bit for bit, in {len(compared) - len(changed)} of "
        line += _count(len(compared), "matrix", "matrices")
        if changed and self.changes is not None:
            line += f" ({self.changes})"
        line += f"; {self.compared - len(self.differing)} of {_count(self.compared, 'other tensor')} are the same"
        return [line, *(f"{name}: differs from the dense model's" for name in self.differing if self._may_differ)]

    @property
    def _may_differ(self) -> bool:
        return self.stated is not None and self.stated.kept_weights == TRAINED


def verify(
    model: str | Path, *, masks: MaskFile | None = None, dense: str | Path | None = None, pattern: Pattern | None = None
) -> Verification:
    """Check the weights of `model`, a Hugging Face directory or hub id, dense, sparse or compressed, against what is said of them.

    What is said: the hash in HASH_FILE, the tensors that config.json asks for, and what the arguments claim. The matrices of the blocks
    are found by name and shape (`StoredWeights.is_block_matrix`), so no model is built.

    Args:
        masks: no weight that these masks remove is non-zero. A weight that they keep may be zero.
        dense: the model has the tensors of this dense model, of the same dtypes and shapes. The weights that are kept have its bits, and
            so have all other tensors, unless HASH_FILE or config.json says that kept weights were trained, updated or rounded.
        pattern: no block of a matrix, nor of its mask, keeps more weights.

    Raises MaskLLMError if a directory or a file cannot be found or read, or if a mask has another size than its weight.
    """
    weights = StoredWeights(model)
    original = None if dense is None else StoredWeights(dense)
    found = Verification(
        model=str(model),
        directory=str(weights.directory),
        tensors=len(weights.names),
        pattern=None if pattern is None else str(pattern),
        mask=None if masks is None else str(masks.path),
        dense=None if dense is None else str(dense),
        stated=read_hash(weights.directory),
        rounded=any(map(weights.is_rounded, weights.names)),
    )
    found.findings += _about_names(weights, original, masks)
    masked = set() if masks is None else set(masks.names)
    for name in tqdm(weights.names, desc="verify", unit="tensor", disable=None, leave=False):
        weight = weights.load(name)
        before = _original(name, weights, original, found)
        if weight.dim() != 2 or not (weights.is_block_matrix(name) or name in masked):
            if before is not None:
                found.compared += 1
                _compare_whole(name, weight, before, found)
            continue
        mask = weights.as_matrix(name, masks.mask(name, tuple(weight.shape))) if name in masked else None
        before = None if before is None else weights.as_matrix(name, before)
        _check_matrix(name, weights.as_matrix(name, weight), mask, before, pattern, found)
    for copy, name in weights.copies.items():
        if name in weights.names and not _same(weights.load(copy), weights.load(name)):
            found.findings.append(Finding(copy, f"differs from {name}, to which config.json ties it"))
    found.weights_sha256 = weights.sha256()
    if found.stated is not None and found.stated.weights_sha256 != found.weights_sha256:
        found.findings.append(Finding(None, f"{HASH_FILE} states the weights sha256 {found.stated.weights_sha256}"))
    return found


def _about_names(weights: StoredWeights, original: StoredWeights | None, masks: MaskFile | None) -> Iterator[Finding]:
    """What can be said without reading a tensor: missing and unknown tensors and masks, shapes of config.json."""
    names = set(weights.names)
    expected = weights.expected_shapes()
    for name, shape in expected.items():
        if name not in names:
            yield Finding(name, "is missing, and config.json asks for it")
        elif weights.shape(name) != shape:
            yield Finding(name, f"has shape {list(weights.shape(name))}; config.json asks for {list(shape)}")
    for name in weights.unknown:
        yield Finding(name, "is no tensor of the model in config.json")
    if original is not None:
        had = set(original.names) | set(original.unknown)
        yield from (Finding(name, "is missing, and the dense model has it") for name in sorted(had - names - set(expected)))
        yield from (Finding(name, "is not in the dense model") for name in sorted((names | set(weights.unknown)) - had))
    if masks is not None:
        unmasked = {name for name in names if weights.is_block_matrix(name)} - set(masks.names)
        yield from (Finding(name, f"has no mask in {masks.path}") for name in sorted(unmasked))
        matrices = {name for name in names if len(weights.shape(name)) == 2}
        yield from (
            Finding(name, f"has a mask in {masks.path}, and the model no such matrix")
            for name in sorted(set(masks.names) - matrices)
        )


def _original(name: str, weights: StoredWeights, original: StoredWeights | None, found: Verification) -> torch.Tensor | None:
    """The dense model's tensor, or None if there is none to compare with. Notes another shape or dtype."""
    if original is None or name not in original.names:
        return None
    here, there = ((each.stored_dtype(name), list(each.shape(name))) for each in (weights, original))
    if here == there:
        return original.load(name)
    found.findings.append(Finding(name, f"is {here[0]} {here[1]}; the dense model's is {there[0]} {there[1]}"))
    return None


def _compare_whole(name: str, tensor: torch.Tensor, before: torch.Tensor, found: Verification) -> None:
    """Compare a tensor that no mask belongs to with the dense model's."""
    if _same(tensor, before):
        return
    found.differing.append(name)
    if not found._may_differ:
        found.findings.append(Finding(name, "differs from the dense model's"))


def _check_matrix(
    name: str,
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    before: torch.Tensor | None,
    pattern: Pattern | None,
    found: Verification,
) -> None:
    """Check a matrix [out, in] with its mask and the dense model's matrix, and note what its weights show."""
    nonzero = (weight != 0).contiguous()
    facts, blocks = _facts(nonzero, pattern)
    found.matrices[name] = facts
    if pattern is not None:
        for what, kept in (("", nonzero), ("its mask ", mask)):
            if kept is not None and (problem := _pattern_problem(kept, pattern)) is not None:
                found.findings.append(Finding(name, f"{what}{problem}"))
    if mask is not None:
        outside = nonzero & ~mask
        facts.kept, facts.kept_zeros = int(mask.sum()), int((mask & ~nonzero).sum())
        if outside.any():
            count = _count(int(outside.sum()), "non-zero weight")
            found.findings.append(Finding(name, f"has {count} that the mask removes; the first is {_place(outside, blocks)}"))
    if before is not None:
        changed = _changed(weight, before) & (nonzero if mask is None else mask)
        facts.changed = int(changed.sum())
        if facts.changed and found.changes is None:
            count = f"{facts.changed:,} of {int((nonzero if mask is None else mask).sum()):,}"
            found.findings.append(
                Finding(name, f"kept weights that are not the dense model's: {count}; the first is {_place(changed, blocks)}")
            )


def _facts(nonzero: torch.Tensor, pattern: Pattern | None) -> tuple[MatrixFacts, int | None]:
    """What the places of the non-zeros show, and the size of the blocks, if they have any."""
    zeros = 1 - int(nonzero.sum()) / max(1, nonzero.numel())
    if pattern is not None and nonzero.shape[1] % pattern.m == 0 and not broken_blocks(nonzero, pattern).any():
        return MatrixFacts(str(pattern), 0, zeros), pattern.m
    own = found_pattern(nonzero)
    if own is not None:
        return MatrixFacts(str(own.pattern), own.broken, zeros), own.pattern.m
    return MatrixFacts("dense" if zeros <= _DENSE_ZEROS else "unstructured", 0, zeros), None if pattern is None else pattern.m


def _pattern_problem(kept: torch.Tensor, pattern: Pattern) -> str | None:
    """How a matrix or its mask, bool [out, in], breaks the pattern; None if it does not."""
    if kept.shape[1] % pattern.m:
        return f"has {kept.shape[1]} inputs, no multiple of {pattern.m}, so it cannot be {pattern}"
    broken = broken_blocks(kept.contiguous(), pattern)
    if not broken.any():
        return None
    row, block = broken.nonzero()[0].tolist()
    first, last = block * pattern.m, (block + 1) * pattern.m - 1
    return (
        f"is not {pattern}: {int(broken.sum()):,} of {_count(broken.numel(), 'block')} with more than {pattern.n} kept weights; "
        f"output {row}, block {block} (inputs {first} to {last}) has {int(kept[row, first : last + 1].sum())}"
    )


def _place(chosen: torch.Tensor, m: int | None) -> str:
    """Where the first of `chosen`, bool [out, in], is."""
    index = int(chosen.flatten().to(torch.uint8).argmax())
    row, column = divmod(index, chosen.shape[1])
    return f"output {row}, input {column}" + ("" if m is None else f" (block {column // m})")


def _changed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one shape and dtype have other bits: bool of their shape. A zero equals a negative zero."""
    return (_bits(one) != _bits(other)) & ~((one == 0) & (other == 0))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, shape and bits."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_INTEGERS[tensor.dtype.itemsize])


def _count(number: int, one: str, many: str | None = None) -> str:
    """A number and a word, which is plural if the number is not 1."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
