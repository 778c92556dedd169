"""`maskllm compress`: a sparse Hugging Face checkpoint to one that stores the non-zeros alone, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskllm.errors import MaskLLMError
from maskllm.export.block_weights import BlockWeights
from maskllm.export.calibrated import CalibratedBlocks
from maskllm.export.pattern_search import smallest_layout
from maskllm.files import atomic_directory, empty_output, read_json_object, write_json
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.loading import compute_dtype, usable_device
from maskllm.huggingface.mask_file import MaskFile
from maskllm.huggingface.shards import STORED_NAMES, ShardWriter, TensorSpec, write_shards
from maskllm.huggingface.side_files import read_side_files, write_side_files
from maskllm.huggingface.tensors import HFTensors
from maskllm.huggingface.weights_hash import read_hash, write_hash
from maskllm.inference.compressed_format import (
    CompressedMatrix,
    dense_tensors,
    dense_weight,
    from_config,
    mark_needs_maskllm,
    stored_shapes,
    to_config,
)
from maskllm.ops.sparse_linear import Layout, sparse_pack
from maskllm.patterns import Pattern
from maskllm.pruning.calibration import Calibration

BITS = (32, 16, 8, 4)
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class CompressSettings:
    """How kept values are stored."""

    bits: int | None = None
    """Of a kept value; None: the dtype that it has."""
    group_size: int = 128
    """With 8 and 4 bits: the columns that share a scale; -1: a whole row."""
    pattern: Pattern | None = None
    """Compress only matrices with this pattern; None: find each matrix's own."""


@dataclass
class CompressReport:
    """What was written. Sizes are bytes of tensors."""

    matrices: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each compressed matrix by name: pattern (None: unstructured), shape, share of zeros, dense bytes, bytes.

    With calibration also what `QuantizedMatrix.report` has, if it is in a block that was calibrated."""
    dense: dict[str, float | None] = field(default_factory=dict)
    """The share of zeros of each matrix of the blocks that stays dense; None if its dtype cannot be compressed."""
    negative_zeros: int = 0
    """Negative zeros beside N non-zeros, or unstructured: `--decompress` gives them back as positive zeros."""
    dense_bytes: int = 0
    """Of the compressed matrices before."""
    compressed_bytes: int = 0
    """Of the compressed matrices after."""
    bytes_before: int = 0
    """Of all tensors."""
    bytes: int = 0
    calibration: dict[str, Any] | None = None


def compress(
    model: str | Path,
    output: str | Path,
    settings: CompressSettings | None = None,
    *,
    masks: MaskFile | None = None,
    calibration: Calibration | None = None,
    device: str | torch.device | None = None,
) -> CompressReport:
    """Write the sparse checkpoint `model`, a directory or a hub id, in compressed form to the directory `output`.

    Every matrix of the blocks is looked at: stored are the non-zeros and their places if that takes fewer bytes. All other tensors
    keep their bits. The weights are read twice, to find the layouts and to write; one matrix is in memory at a time, or one block of
    the model with calibration. `output` appears complete or not at all.

    Args:
        masks: set the weights that these masks remove to zero first.
        calibration: for 8 and 4 bits: round by a sweep that minimizes the error of the blocks' outputs (`maskllm.pruning.quantize`),
            in a causal language model. Without it, and in other blocks, weights are rounded to the nearest.
        device: to calibrate on; the default is the GPU if there is one.

    Raises MaskLLMError if `output` exists and is not empty, if `model` is no Hugging Face checkpoint, quantized or of an architecture
    that transformers does not have, if masks, settings or calibration data do not fit, and if no matrix is sparse.
    """
    settings = settings or CompressSettings()
    if calibration is not None and settings.bits not in (8, 4):
        raise MaskLLMError(f"--calibration-data {calibration.data}: chooses integers; wanted --bits 8 or 4 too")
    if settings.bits in (8, 4) and settings.pattern is None and settings.group_size != -1 and settings.group_size % 4:
        raise MaskLLMError(
            f"--group-size {settings.group_size}: wanted a multiple of 4, the columns of a block, or -1; other blocks go with --pattern"
        )
    output = empty_output(output)
    directory = find_source(model)
    config = read_json_object(directory / "config.json")
    if config.get("quantization_config") is not None:
        raise MaskLLMError(f"{directory}: its weights are quantized or compressed already; wanted a dense checkpoint")
    tensors = HFTensors(directory)
    weights = BlockWeights(directory, tensors, masks)
    report = CompressReport(bytes_before=sum(_spec(tensors, name).nbytes for name in tensors.names))
    blocks = None
    if calibration is not None:
        device = usable_device(device)
        stored = tensors.dtype((weights.names or tensors.names)[0])
        calibration = dataclasses.replace(calibration, params_dtype=calibration.params_dtype or compute_dtype(stored, device))
        report.calibration = calibration.as_dict()
        blocks = CalibratedBlocks(directory, weights, calibration, device)
    found = {tensor: matrix for tensor, matrix in _find_layouts(weights, settings, report) if matrix is not None}
    if not found:
        raise MaskLLMError(_why_nothing(directory, settings, report))
    plan = {}
    for name in tensors.names:
        plan |= {name: _spec(tensors, name)} if name not in found else _stored_specs(name, found[name], report)
    with atomic_directory(output, replace=False) as temporary, write_shards(temporary, plan) as writer:
        report.bytes = writer.total_bytes
        calibrated = set()
        for name, quantized in blocks.quantized({name: matrix.layout for name, matrix in found.items()}) if blocks else ():
            kept = weights.matrix(name) != 0
            _write_matrix(writer, name, sparse_pack(quantized.weight.cpu(), found[name].layout, name, kept, quantized.scales.cpu()))
            report.matrices[_module(name)] |= quantized.report
            calibrated.add(name)
        with tqdm(total=report.bytes_before, unit="B", unit_scale=True, desc="compress", disable=None) as progress:
            for name in tensors.names:
                if name not in found:
                    writer.write(name, tensors.load(name))
                elif name not in calibrated:
                    matrix, weight = found[name], weights.matrix(name)
                    kept = weight != 0 if matrix.layout.pattern is None else None  # as many as announced: rounding may make zeros
                    _write_matrix(writer, name, sparse_pack(weight.to(matrix.pack_dtype), matrix.layout, name, kept))
                progress.update(_spec(tensors, name).nbytes)
        _write_other_files(directory, temporary, writer)
        matrices = {_module(name): matrix.stored for name, matrix in found.items()}
        mark_needs_maskllm(temporary, config | {"quantization_config": to_config(matrices)})
    return report


def decompress(model: str | Path, output: str | Path) -> int:
    """Write the compressed checkpoint `model` as the dense checkpoint that it was made of to `output`; returns the bytes of its tensors.

    With 16 and 32 bits every tensor has the bits that it had (but for the negative zeros that `compress` reports), and so have all
    files but config.json, which has its values, and the split into files, which is transformers' own. One matrix is in memory at a
    time. `output` appears complete or not at all.

    Raises MaskLLMError if `output` exists and is not empty, if `model` is not compressed, and if a tensor is damaged.
    """
    output = empty_output(output)
    directory = find_source(model)
    config = read_json_object(directory / "config.json")
    matrices = from_config(config.pop("quantization_config", None), str(directory / "config.json"))
    config.pop("transformers_weights", None)
    tensors = HFTensors(directory)
    for name, matrix in matrices.items():
        stored_shapes(tensors, name, matrix)
    dense = dense_tensors(tensors, matrices)
    plan = {
        name: _spec(tensors, name) if matrix is None else TensorSpec(STORED_NAMES[matrix.dtype], matrix.dense_shape)
        for name, matrix in dense.items()
    }
    with (
        atomic_directory(output, replace=False) as temporary,
        write_shards(temporary, plan) as writer,
        tqdm(total=writer.total_bytes, unit="B", unit_scale=True, desc="decompress", disable=None) as progress,
    ):
        for name, matrix in dense.items():
            writer.write(name, tensors.load(name) if matrix is None else dense_weight(tensors, _module(name), matrix))
            progress.update(plan[name].nbytes)
        _write_other_files(directory, temporary, writer)
        write_json(temporary / "config.json", config)
    return writer.total_bytes


def _write_matrix(writer: ShardWriter, name: str, stored: dict[str, torch.Tensor]) -> None:
    for key, tensor in stored.items():
        writer.write(f"{_module(name)}.{key}", tensor)


def _write_other_files(source: Path, target: Path, writer: ShardWriter) -> None:
    """Everything but weights and config.json; also the hash of the new weights if the source states that of its own."""
    write_side_files(read_side_files(source), target)
    if (stated := read_hash(source)) is not None:
        write_hash(target, dataclasses.replace(stated, weights_sha256=writer.weights_hash.hexdigest()))


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _spec(tensors: HFTensors, name: str) -> TensorSpec:
    return TensorSpec(tensors.stored_dtype(name), tensors.shape(name))


@dataclass(frozen=True)
class _Found:
    """The layout of a matrix, and what is needed to announce its tensors."""

    stored: CompressedMatrix
    kept: int
    zeros: float

    @property
    def layout(self) -> Layout:
        return self.stored.layout

    @property
    def pack_dtype(self) -> torch.dtype:
        """The dtype of the matrix for `sparse_pack`."""
        return self.stored.dtype if self.layout.quantized else self.stored.values_dtype


def _find_layouts(weights: BlockWeights, settings: CompressSettings, report: CompressReport) -> Iterator[tuple[str, _Found | None]]:
    """Read each weight, and find its layout or None. Notes in the report which weights stay dense."""
    for tensor in tqdm(weights.names, desc="find zeros", unit="matrix", disable=None, leave=False):
        dtype = _FLOATS.get(weights.tensors.stored_dtype(tensor))
        if dtype is None:
            report.dense[_module(tensor)] = None
            continue
        bits = settings.bits or 8 * dtype.itemsize
        if bits > 8 * dtype.itemsize:
            raise MaskLLMError(f"--bits {bits}: {tensor} has {8 * dtype.itemsize} bits a weight; leave --bits out to keep them")
        group_size = settings.group_size if bits < 16 else -1
        matrix = weights.matrix(tensor)
        kept = matrix != 0
        count = int(kept.sum())
        zeros = 1 - count / max(1, matrix.numel())
        layout = smallest_layout(kept, dtype, bits, settings.pattern, group_size)
        if layout is None:
            report.dense[_module(tensor)] = zeros
            yield tensor, None
            continue
        if bits >= 16:
            report.negative_zeros += _lost_signs(matrix, kept, layout)
        yield tensor, _Found(CompressedMatrix(*matrix.shape, layout, dtype, weights.transposed(tensor)), count, zeros)


def _lost_signs(matrix: torch.Tensor, kept: torch.Tensor, layout: Layout) -> int:
    """The negative zeros that do not come back: `sparse_pack` keeps those that have room in their block."""
    negative = matrix.signbit() & ~kept
    if not negative.any():
        return 0
    if layout.pattern is None:
        return int(negative.sum())
    n, m = layout.pattern.n, layout.pattern.m
    room = n - kept.unflatten(1, (-1, m)).sum(-1)
    return int((negative.unflatten(1, (-1, m)).sum(-1) - room).clamp(min=0).sum())


def _stored_specs(tensor: str, matrix: _Found, report: CompressReport) -> dict[str, TensorSpec]:
    """The stored tensors of a matrix. Notes its sizes in the report."""
    stored, name = matrix.stored, _module(tensor)
    dtypes = stored.layout.dtypes(stored.values_dtype)
    shapes = stored.layout.shapes(stored.out_features, stored.in_features, matrix.kept)
    specs = {f"{name}.{key}": TensorSpec(STORED_NAMES[dtypes[key]], tuple(shape)) for key, shape in shapes.items()}
    dense, size = stored.out_features * stored.in_features * stored.dtype.itemsize, sum(spec.nbytes for spec in specs.values())
    pattern = stored.layout.pattern
    report.matrices[name] = {
        "pattern": None if pattern is None else str(pattern),
        "shape": [stored.out_features, stored.in_features],
        "zeros": matrix.zeros,
        "dense_bytes": dense,
        "bytes": size,
    }
    report.dense_bytes += dense
    report.compressed_bytes += size
    return specs


def _why_nothing(directory: Path, settings: CompressSettings, report: CompressReport) -> str:
    wanted = "sparse enough to save bytes" if settings.pattern is None else f"of the pattern {settings.pattern}"
    shares = [share for share in report.dense.values() if share is not None]
    most = f"; the sparsest has {max(shares):.1%} zeros" if shares else ""
    return (
        f"{directory}: none of the {len(report.dense)} matrices of its blocks is {wanted}{most}. Prune it first (docs/pruning.md)"
    )
