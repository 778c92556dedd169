"""Compressed checkpoints in vLLM: its linears hold the stored weights and multiply with this project's operators.

vLLM fuses some matrices (query, key and value; gate and up) and splits each over the ranks of tensor parallelism. Which rows or columns
of a matrix a rank holds, and at which rows of its linear, is asked of vLLM's own weight loaders: they load the numbers of the rows
instead of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from maskllm.errors import MaskLLMError
from maskllm.inference import QUANT_METHOD
from maskllm.inference.compressed_format import CompressedMatrix, from_config
from maskllm.inference.sparse_linear import SparseLinear
from maskllm.ops.sparse_linear import TENSORS, Layout, sparse_check
from maskllm.ops.sparse_slicing import sparse_columns, sparse_rows, sparse_stack

_REORDERED_BY_NAME = ("llama4", "llama4_text")


@register_quantization_config(QUANT_METHOD)
class MaskLLMVLLMConfig(QuantizationConfig):
    """vLLM's view of the `quantization_config` of a compressed checkpoint."""

    def __init__(self, matrices: dict[str, CompressedMatrix]) -> None:
        super().__init__()
        self.matrices = matrices

    def get_name(self) -> str:
        """The `quant_method`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the operators take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The first compute capability that the CUDA kernels run on."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MaskLLMVLLMConfig:
        """Raises MaskLLMError if it cannot be the `quantization_config` of a compressed checkpoint."""
        return cls(from_config(config, "config.json"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raise MaskLLMError for a model whose rows vLLM reorders by the name `weight`, while it loads."""
        if getattr(hf_config, "model_type", None) in _REORDERED_BY_NAME:
            raise MaskLLMError(
                f"{model_name}: vLLM reorders the rows of query and key of {hf_config.model_type} while it loads, in dense checkpoints "
                "only: use `maskllm compress --decompress`"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Give the matrices the names that their modules have in vLLM's model."""
        self.matrices = hf_to_vllm_mapper.apply_dict(self.matrices)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer: None for one that is no linear, vLLM's own for a linear of which no matrix is compressed."""
        if not isinstance(layer, LinearBase):
            inside = next((name for name in self.matrices if prefix and name.startswith(f"{prefix}.")), None)
            if inside is not None:  # a mixture of experts
                raise MaskLLMError(
                    f"{inside}: compressed, and vLLM multiplies it in {type(layer).__name__}, which can be served from a dense "
                    "checkpoint only: use `maskllm compress --decompress`"
                )
            return None
        for full in (prefix, prefix.partition(".")[2]):  # the files of a base model do not have the model's own prefix
            names = self._names(full)
            if any(name in self.matrices for name in names):
                return MaskLLMLinearMethod({name: self.matrices.get(name) for name in names})
        return UnquantizedLinearMethod()

    def _names(self, prefix: str) -> list[str]:
        """The checkpoint's names of the matrices of a linear, in the order of its rows."""
        parent, dot, last = prefix.rpartition(".")
        if prefix in self.matrices:
            return [prefix]
        return [parent + dot + name for name in self.packed_modules_mapping.get(last, [last])]


@dataclass
class _Piece:
    """Rows of a linear, as one matrix. Without a layout it is dense, and `tensors` has its `weight`."""

    first: int
    rows: int
    matrix: CompressedMatrix | None
    layout: Layout | None
    tensors: dict[str, torch.Tensor]

    def follows(self, other: _Piece) -> bool:
        """Whether both can be stacked."""
        kinds = [(key, tensor.dtype) for key, tensor in sorted(self.tensors.items())]
        return self.layout == other.layout and kinds == [(key, tensor.dtype) for key, tensor in sorted(other.tensors.items())]


class _WithoutRows(nn.Parameter):
    """For a tensor of an unstructured matrix that has no dimension of rows."""

    @property
    def output_dim(self) -> int:
        """Asked for by models that reorder the rows of a matrix before its loader is called. Raises MaskLLMError."""
        raise MaskLLMError(
            "vLLM reorders the rows of the fused query, key and value of this model while it loads, and an unstructured matrix can have "
            "no such reordering: use an N:M pattern, or `maskllm compress --decompress`"
        )


class MaskLLMLinearMethod(LinearMethodBase):
    """How one linear of vLLM loads its matrices and multiplies with them. Fused matrices whose layouts agree become one matrix.

    Args:
        matrices: those that the linear is made of, by their names in the checkpoint; None for one that is stored dense.
    """

    def __init__(self, matrices: dict[str, CompressedMatrix | None]) -> None:
        self._matrices = matrices
        self._arrived: dict[str, dict[str, torch.Tensor]] = {}
        self._pieces: list[_Piece] = []

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer an empty parameter for each tensor that the checkpoint has of it; their loaders collect the tensors."""
        self._vllm_loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        self._rows = sum(output_partition_sizes)
        self._columns, self._all_columns = input_size_per_partition, input_size
        self._dtype = params_dtype
        dtypes: dict[str, torch.dtype] = {}
        for matrix in self._matrices.values():
            dtypes = ({"weight": params_dtype} if matrix is None else matrix.layout.dtypes(matrix.values_dtype)) | dtypes
        for key, dtype in dtypes.items():
            if key in ("values", "row_starts") and any(
                matrix and matrix.layout.pattern is None for matrix in self._matrices.values()
            ):
                parameter = _WithoutRows(torch.empty(0, dtype=dtype), requires_grad=False)
            else:
                parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                parameter.output_dim = 0  # Falcon reorders rows along it
            parameter.weight_loader = self._loader(key)
            layer.register_parameter(key, parameter)

    def _loader(self, key: str) -> Callable[..., None]:
        def load(parameter: nn.Parameter, loaded: torch.Tensor, shard_id: Any = None) -> None:
            name = self._name(shard_id)
            matrix = self._matrices[name]
            keys = {"weight"} if matrix is None else set(matrix.layout.dtypes(matrix.values_dtype))
            if key not in keys:
                raise MaskLLMError(f"the checkpoint has a tensor {name}.{key}; its layout has {', '.join(sorted(keys))}")
            arrived = self._arrived.setdefault(name, {})
            arrived[key] = loaded
            if arrived.keys() == keys:
                self._take(name, shard_id, self._arrived.pop(name), parameter.device)

        return load

    def _name(self, shard_id: Any) -> str:
        names = list(self._matrices)
        index = {None: 0, "q": 0, "k": 1, "v": 2}.get(shard_id, shard_id)
        if not isinstance(index, int) or index >= len(names) or (shard_id is None and len(names) > 1):
            raise MaskLLMError(f"{', '.join(names)}: vLLM loads part {shard_id!r} of them, which cannot be served compressed")
        return names[index]

    def _take(self, name: str, shard_id: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Check a whole matrix, and keep the rows or columns of it that this rank multiplies with."""
        matrix = self._matrices[name]
        if matrix is not None:
            if matrix.in_features != self._all_columns:
                raise MaskLLMError(f"{name}: has {matrix.in_features} columns; vLLM's linear has {self._all_columns}")
            sparse_check(tensors, matrix.layout, matrix.out_features, matrix.in_features, name)
        rows = matrix.out_features if matrix is not None else len(tensors["weight"])
        columns = self._columns_of_rank()
        for first, begin, end in self._rows_of_rank(shard_id, rows):
            if matrix is None:
                layout = None
                part = {"weight": tensors["weight"][begin:end, columns[0] : columns[1]].to(self._dtype)}
            else:
                part = sparse_rows(tensors, matrix.layout, begin, end)
                part, layout = sparse_columns(part, matrix.layout, matrix.in_features, *columns)
                values = part["values"]
                if values.is_floating_point() and self._dtype.itemsize <= values.element_size():
                    part["values"] = values.to(self._dtype)  # as `SparseLinear` has it
            part = {key: tensor.to(device, copy=True).contiguous() for key, tensor in part.items()}
            self._pieces.append(_Piece(first, end - begin, matrix, layout, part))

    def _rows_of_rank(self, shard_id: Any, rows: int) -> list[tuple[int, int, int]]:
        """Runs of a matrix's rows that this rank has: the row of the linear, the first row of the matrix, and that after the last."""
        if self._columns != self._all_columns:
            return [(0, 0, rows)]
        probe = self._load_numbers(torch.full((self._rows, 1), -1), "output_dim", 0, torch.arange(rows).unsqueeze(1), shard_id)
        runs: list[tuple[int, int, int]] = []
        for place in (probe >= 0).nonzero().flatten().tolist():
            row = int(probe[place])
            if runs and runs[-1][2] == row and runs[-1][0] + row - runs[-1][1] == place:
                runs[-1] = (*runs[-1][:2], row + 1)
            else:
                runs.append((place, row, row + 1))
        return runs

    def _columns_of_rank(self) -> tuple[int, int]:
        if self._columns == self._all_columns:
            return 0, self._columns
        probe = self._load_numbers(torch.full((1, self._columns), -1), "input_dim", 1, torch.arange(self._all_columns).unsqueeze(0))
        return int(probe[0]), int(probe[-1]) + 1

    def _load_numbers(self, target: torch.Tensor, name: str, dim: int, numbers: torch.Tensor, shard_id: Any = None) -> torch.Tensor:
        """Let vLLM load `numbers` into `target` as it loads weights, along the dimension `dim`."""
        parameter = nn.Parameter(target, requires_grad=False)
        setattr(parameter, name, dim)
        self._vllm_loader(parameter, numbers, *([] if shard_id is None else [shard_id]))
        return parameter.data.flatten()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Put the parts of the linear in place of the empty parameters. Raises MaskLLMError if the checkpoint had not all of them."""
        pieces = sorted(self._pieces, key=lambda piece: piece.first)
        if self._arrived or sum(piece.rows for piece in pieces) != self._rows:
            have = {f"{name}.{key}" for name, tensors in self._arrived.items() for key in tensors}
            raise MaskLLMError(
                f"{', '.join(self._matrices)}: the checkpoint has not all tensors of them"
                + (f"; of the incomplete ones it has {', '.join(sorted(have))}" if have else "")
            )
        self._pieces = []
        for key in (*TENSORS, "weight"):
            layer._parameters.pop(key, None)
        groups: list[list[_Piece]] = []
        for piece in pieces:
            if groups and piece.follows(groups[-1][-1]):
                groups[-1].append(piece)
            else:
                groups.append([piece])
        layer.parts = nn.ModuleList(self._part(group) for group in groups)

    def _part(self, pieces: list[_Piece]) -> nn.Module:
        rows = sum(piece.rows for piece in pieces)
        matrix, layout = pieces[0].matrix, pieces[0].layout
        if matrix is None or layout is None:
            linear = nn.Linear(self._columns, rows, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.cat([piece.tensors["weight"] for piece in pieces]), requires_grad=False)
            return linear
        tensors = sparse_stack([piece.tensors for piece in pieces], layout)
        part = SparseLinear(
            CompressedMatrix(rows, self._columns, layout, matrix.dtype),
            self._dtype,
            {key: list(tensor.shape) for key, tensor in tensors.items()},
            bias=False,
            device="meta",
        )
        for key, tensor in tensors.items():
            part.register_parameter(key, nn.Parameter(tensor, requires_grad=False))
        return part

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Map `x` [..., in] to [..., out] of its dtype."""
        parts = layer.parts
        biases = [None] * len(parts) if bias is None else bias.split([part.out_features for part in parts])
        outputs = [_product(part, x, part_bias) for part, part_bias in zip(parts, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _product(part: nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(part, SparseLinear):
        return part.product(x, bias)
    return nn.functional.linear(x, part.weight, bias)
