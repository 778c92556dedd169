"""What the config.json of a compressed checkpoint says of its weights (docs/compressed-format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskllm.dtypes import BY_NAME, dtype_name
from maskllm.errors import MaskLLMError
from maskllm.files import write_json
from maskllm.huggingface.shards import STORED_NAMES
from maskllm.huggingface.tensors import INDEX_ENDING, NEEDS_MASKLLM, HFTensors
from maskllm.inference import QUANT_METHOD
from maskllm.ops.sparse_linear import TENSORS, Layout, sparse_check, sparse_expand
from maskllm.patterns import Pattern

FORMAT_VERSION = 1

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CompressedMatrix:
    """A compressed matrix of a checkpoint."""

    out_features: int
    in_features: int
    layout: Layout
    dtype: torch.dtype
    """The dtype of the dense weight."""
    transposed: bool = False
    """Whether the dense weight is stored as [in, out] (`Conv1D` of GPT-2)."""

    @property
    def dense_shape(self) -> tuple[int, int]:
        """The shape of the dense weight."""
        shape = (self.out_features, self.in_features)
        return shape[::-1] if self.transposed else shape

    @property
    def values_dtype(self) -> torch.dtype:
        """The dtype of the kept values. fp32 weights that are stored in 16 bits are bf16."""
        rounded = self.layout.bits == 16 and self.dtype == torch.float32
        return self.layout.dtypes(torch.bfloat16 if rounded else self.dtype)["values"]


def to_config(matrices: Mapping[str, CompressedMatrix]) -> dict[str, Any]:
    """The `quantization_config` for compressed matrices, given by the names of their modules."""
    groups: dict[tuple, dict[str, Any]] = {}
    for name, matrix in matrices.items():
        layout = matrix.layout
        key = (layout, matrix.dtype, matrix.transposed)
        if key not in groups:
            groups[key] = {
                "pattern": None if layout.pattern is None else str(layout.pattern),
                "bits": layout.bits,
                "group_size": layout.group_size,
                "dtype": dtype_name(matrix.dtype),
                "transposed": matrix.transposed,
                "matrices": {},
            }
        groups[key]["matrices"][name] = [matrix.out_features, matrix.in_features]
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "layouts": list(groups.values())}


def from_config(config: Any, where: str) -> dict[str, CompressedMatrix]:
    """The compressed matrices by module name, from the `quantization_config` of the file `where`.

    Raises MaskLLMError if it is no such config, of a newer version, or has a value that cannot be.
    """
    if not isinstance(config, dict) or config.get("quant_method") != QUANT_METHOD:
        raise MaskLLMError(f"{where}: has no quantization_config of maskllm; wanted a checkpoint that `maskllm compress` wrote")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise MaskLLMError(
            f"{where}: format_version {version!r} of a compressed checkpoint; this maskllm reads {FORMAT_VERSION}, so upgrade it"
        )
    groups = config.get("layouts")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise MaskLLMError(f"{where}: layouts of quantization_config is {type(groups).__name__}; wanted a list of objects")
    matrices: dict[str, CompressedMatrix] = {}
    for group in groups:
        pattern, dtype, names = group.get("pattern"), group.get("dtype"), group.get("matrices")
        dtype = BY_NAME.get(dtype) if isinstance(dtype, str) else None
        numbers = [group.get("bits"), group.get("group_size")]
        if (
            not (pattern is None or isinstance(pattern, str))
            or dtype not in _DTYPES
            or not all(type(number) is int for number in numbers)
            or type(group.get("transposed")) is not bool
            or not isinstance(names, dict)
        ):
            shown = {key: value for key, value in group.items() if key != "matrices"}
            raise MaskLLMError(f"{where}: a layout of quantization_config is not understood: {str(shown)[:200]}")
        try:
            layout = Layout(None if pattern is None else Pattern.parse(pattern), *numbers)
        except MaskLLMError as error:
            raise MaskLLMError(f"{where}: a layout of quantization_config: {error}") from None
        for name, shape in names.items():
            if not (
                isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and 0 < size < 1 << 31 for size in shape)
            ):
                raise MaskLLMError(f"{where}: {name} has shape {shape}; wanted [out, in]")
            if name in matrices:
                raise MaskLLMError(f"{where}: {name} is in two layouts of quantization_config")
            if layout.pattern is not None:
                layout.pattern.check_divides(shape[1], f"{where}: {name}")
            matrices[name] = CompressedMatrix(*shape, layout, dtype, group["transposed"])
    return matrices


def dense_tensors(tensors: HFTensors, matrices: Mapping[str, CompressedMatrix]) -> dict[str, CompressedMatrix | None]:
    """The tensors that the dense checkpoint has, in the order of the files: by name the compressed matrix, or None for any other tensor.

    Raises MaskLLMError if the files have a matrix that is not among `matrices`.
    """
    parts = {f"{name}.{key}": name for name in matrices for key in TENSORS}
    have = set(tensors.names)
    for tensor in tensors.names:
        name = tensor.removesuffix(".places")
        if name != tensor and name not in matrices and f"{name}.values" in have:
            raise MaskLLMError(f"{tensors.file(tensor)}: has a compressed matrix {name}, which quantization_config does not name")
    dense: dict[str, CompressedMatrix | None] = {}
    for tensor in tensors.names:
        if tensor in parts:
            dense[f"{parts[tensor]}.weight"] = matrices[parts[tensor]]
        else:
            dense[tensor] = None
    return dense


def stored_shapes(tensors: HFTensors, name: str, matrix: CompressedMatrix) -> dict[str, list[int]]:
    """The shapes of the tensors of a compressed matrix, as the headers of the files have them.

    Raises MaskLLMError, before any tensor is read, if one is missing or has another shape or dtype than the layout gives it.
    """
    have = set(tensors.names)
    values = f"{name}.values"
    if values not in have:
        raise MaskLLMError(f"{tensors.directory}: has no tensor {values}, which quantization_config names")
    kept = None
    if matrix.layout.pattern is None:
        kept = torch.Size(tensors.shape(values)).numel() * (2 if matrix.layout.bits == 4 else 1)
    shapes = matrix.layout.shapes(matrix.out_features, matrix.in_features, kept)
    dtypes = matrix.layout.dtypes(matrix.values_dtype)
    for key, shape in shapes.items():
        tensor = f"{name}.{key}"
        if tensor not in have:
            raise MaskLLMError(f"{tensors.directory}: has no tensor {tensor}, which the layout of {name} has")
        found, wanted = (tensors.stored_dtype(tensor), list(tensors.shape(tensor))), (STORED_NAMES[dtypes[key]], shape)
        if found != wanted:
            raise MaskLLMError(f"{tensors.file(tensor)}: {tensor} is {found[0]} {found[1]}; wanted {wanted[0]} {wanted[1]}")
    return shapes


def dense_weight(tensors: HFTensors, name: str, matrix: CompressedMatrix) -> torch.Tensor:
    """The dense weight of the compressed matrix `name`, [out, in], or [in, out] if it is transposed.

    Raises MaskLLMError if its tensors cannot be read or hold places, scales or rows that cannot be.
    """
    stored = {key: tensors.load(f"{name}.{key}") for key in TENSORS if f"{name}.{key}" in tensors.names}
    sparse_check(stored, matrix.layout, matrix.out_features, matrix.in_features, f"{tensors.file(f'{name}.values')}: {name}")
    weight = sparse_expand(stored, matrix.layout, matrix.in_features, matrix.dtype)
    return weight.t() if matrix.transposed else weight


def mark_needs_maskllm(directory: Path, config: Mapping[str, Any]) -> None:
    """Write `config` as config.json, so that transformers without maskllm ends in an error that says to install it.

    config.json names an index of weights, the index names a file, and that is not there: a directory on disk and a repository on
    the hub both end in an error with its name.
    """
    index = NEEDS_MASKLLM + INDEX_ENDING
    write_json(directory / index, {"metadata": {}, "weight_map": {"weight": NEEDS_MASKLLM}})
    write_json(directory / "config.json", {**config, "transformers_weights": index})
