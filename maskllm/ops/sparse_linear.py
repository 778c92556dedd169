"""Products with a matrix of which only the non-zeros are stored: its kept values, their places and, for integers, scales.

Stored form of a matrix [out, in]. `Layout` says which it is; `in` is a multiple of M. All tensors are row-major, and little-endian.

* `values`: the kept values in the order of their columns. N:M: [out, in / M * N]; unstructured: [number of kept values].
  bits 32: fp32; bits 16: bf16 or fp16; bits 8: int8; bits 4: uint8, two's complement numbers of 4 bits, the low half of a byte first,
  each row padded to a whole byte (unstructured: the last byte alone).
* `places`, uint8: the columns of the values.
  2:4: [out, ceil(in / 8)]. Half a byte a block, the low half first: `p0 | p1 << 2`, p0 < p1 (the metadata of `compress24`).
  1:4: [out, ceil(in / 16)]. Two bits a block, the lowest first.
  Any other N:M, and unstructured: [out, ceil(in / 8)]. Bit k of byte j says whether column 8 j + k is kept
  (`numpy.packbits(..., bitorder="little")`).
  Bits after the last block or column are 0.
* `scales`, fp32 [out, groups], with bits 8 and 4: a weight is `value * scale`. A group has `group_size` consecutive columns, the last
  one may have fewer. Values lie in [-127, 127] and [-7, 7].
* `row_starts`, int64 [out + 1], unstructured only: row r has the values `row_starts[r]` to `row_starts[r + 1] - 1`.

`sparse_check` looks at every place, scale and value once. The kernels rely on that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import sparse_many_rows  # noqa: F401  (the CUDA operator calls its operator)
from maskllm.ops import sparse_reference as reference
from maskllm.ops.compress24 import compress24
from maskllm.ops.extension import kernels, warn_if_reference
from maskllm.ops.sparse_reference import Numbers
from maskllm.patterns import Pattern

TENSORS = ("values", "places", "scales", "row_starts")
"""The names of the tensors of a stored matrix."""

_FLOATS = {32: (torch.float32,), 16: (torch.bfloat16, torch.float16)}
_STORED = "Tensor values, Tensor places, Tensor? scales, Tensor? row_starts"
_NUMBERS = "int n, int m, int bits, int group_size"

torch.library.define("maskllm::sparse_linear", f"(Tensor input, {_STORED}, Tensor? bias, {_NUMBERS}) -> Tensor")
torch.library.define("maskllm::sparse_expand", f"({_STORED}, int in_features, {_NUMBERS}, ScalarType dtype) -> Tensor")
torch.library.define("maskllm::sparse_check", f"({_STORED}, int in_features, {_NUMBERS}) -> Tensor")


@dataclass(frozen=True)
class Layout:
    """How a matrix is stored.

    Args:
        pattern: N:M, or None for unstructured.
        bits: 32, 16, 8 or 4 a kept value.
        group_size: with 8 and 4 bits, the columns of a scale, a multiple of M; -1: one scale a row.

    Raises MaskLLMError for any other number.
    """

    pattern: Pattern | None
    bits: int
    group_size: int = -1

    def __post_init__(self) -> None:
        if self.bits not in (32, 16, 8, 4):
            raise MaskLLMError(f"bits {self.bits}: wanted 32, 16, 8 or 4")
        multiple = self.pattern.m if self.pattern else 1
        if self.group_size != -1 and (not self.quantized or not 0 < self.group_size < 1 << 31 or self.group_size % multiple):
            wanted = (
                f"-1 or a multiple of {multiple} from {multiple} to 2^31 - 1" if self.quantized else "-1, for there are no scales"
            )
            raise MaskLLMError(f"group size {self.group_size} with {self.bits} bits: wanted {wanted}")

    @property
    def quantized(self) -> bool:
        """Whether the values are integers with scales."""
        return self.bits in (8, 4)

    @property
    def numbers(self) -> Numbers:
        """The last arguments of the operators."""
        n, m = (self.pattern.n, self.pattern.m) if self.pattern else (0, 0)
        return Numbers(n, m, self.bits, self.group_size)

    def shapes(self, out_features: int, in_features: int, kept: int | None = None) -> dict[str, list[int]]:
        """The shape of each tensor that this layout has. `kept` is the number of kept values of an unstructured matrix."""
        shapes = {"places": [out_features, reference.place_bytes(in_features, self.numbers)]}
        if self.pattern is None:
            shapes["values"] = [reference.value_elements(kept or 0, self.bits)]
            shapes["row_starts"] = [out_features + 1]
        else:
            shapes["values"] = [out_features, reference.value_elements(in_features // self.pattern.m * self.pattern.n, self.bits)]
        if self.quantized:
            shapes["scales"] = [out_features, reference.groups(in_features, self.group_size)]
        return shapes

    def dtypes(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """The dtype of each tensor that this layout has. `dtype` is the original matrix's, which floating-point values keep."""
        dtypes = {"values": {8: torch.int8, 4: torch.uint8}.get(self.bits, dtype), "places": torch.uint8}
        if self.quantized:
            dtypes["scales"] = torch.float32
        if self.pattern is None:
            dtypes["row_starts"] = torch.int64
        return dtypes


def sparse_linear(
    data: torch.Tensor, tensors: dict[str, torch.Tensor], layout: Layout, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`data @ W.T + bias` for a checked stored matrix W [out, in]: [..., in] to [..., out] in the dtype of `data`.

    Sums are fp32. On a CPU, a few rows of `data` by 2:4 or 1:4 in 8 or 4 bits are rounded to 8 bits, each 128 columns with a scale of their
    own (docs/kernels.md says why, and for how many rows). More rows in bf16 multiply weights in bf16 on processors with such
    instructions. It has no gradient.
    """
    return torch.ops.maskllm.sparse_linear(data, *(tensors.get(name) for name in TENSORS), bias, *layout.numbers)


def sparse_expand(tensors: dict[str, torch.Tensor], layout: Layout, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix [out, in] in `dtype` (fp32, bf16 or fp16) from a checked stored one."""
    return torch.ops.maskllm.sparse_expand(*(tensors.get(name) for name in TENSORS), in_features, *layout.numbers, dtype)


def sparse_check(tensors: dict[str, torch.Tensor], layout: Layout, out_features: int, in_features: int, name: str) -> None:
    """Raise MaskLLMError unless `tensors` are a matrix [out, in] of this layout, so that a product reads nothing but them.

    Checked are names, dtypes, shapes, each place, each row's number of values, each scale (finite and positive) and the range of
    integers. The message gives `name`, the tensor, and the first row and block (or group) at fault.
    """
    _check_tensors(tensors, layout, out_features, in_features, name)
    stored = {key: tensor.contiguous() for key, tensor in tensors.items()}
    found = torch.ops.maskllm.sparse_check(*(stored.get(key) for key in TENSORS), in_features, *layout.numbers)
    fault, row, index = found.tolist()
    if fault != reference.FINE:
        raise MaskLLMError(f"{name}.{_fault(fault, row, index, stored, layout, in_features)}; the file is damaged: fetch it again")


def _check_tensors(tensors: dict[str, torch.Tensor], layout: Layout, out_features: int, in_features: int, name: str) -> None:
    """The part of `sparse_check` that needs no look into the tensors."""
    if out_features < 0 or in_features < 0 or max(out_features, in_features) >= 1 << 31:
        raise MaskLLMError(f"{name}: [{out_features}, {in_features}]; wanted sizes from 0 to 2^31 - 1")
    if layout.pattern is not None:
        layout.pattern.check_divides(in_features, name)
    kept = int(tensors["values"].numel()) * (2 if layout.bits == 4 else 1) if "values" in tensors else 0
    shapes = layout.shapes(out_features, in_features, kept)
    if set(tensors) != set(shapes):
        raise MaskLLMError(f"{name}: found {sorted(tensors)}; wanted {sorted(shapes)}")
    for key, shape in shapes.items():
        tensor = tensors[key]
        wanted = _FLOATS.get(layout.bits, ()) if key == "values" else ()
        wanted = wanted or (layout.dtypes(torch.float32)[key],)
        if tensor.dtype not in wanted or list(tensor.shape) != shape:
            raise MaskLLMError(
                f"{name}.{key}: {tensor.dtype} {list(tensor.shape)}; wanted {' or '.join(str(dtype) for dtype in wanted)} {shape}"
            )
        if tensor.device != tensors["values"].device:
            raise MaskLLMError(f"{name}.{key}: on {tensor.device}, and the values on {tensors['values'].device}")


def _fault(fault: int, row: int, index: int, tensors: dict[str, torch.Tensor], layout: Layout, in_features: int) -> str:
    """What is wrong, by the three numbers that the operator found."""
    if fault == reference.BAD_ROW_STARTS:
        values = tensors["values"].numel() * (2 if layout.bits == 4 else 1)
        return (
            f"row_starts: row {row} goes from {int(tensors['row_starts'][row])} to {int(tensors['row_starts'][row + 1])}; "
            f"wanted 0 first, no fall, and {values} values in all"
        )
    if fault == reference.BAD_PLACES:
        byte = int(tensors["places"][row, index // 2])
        half = byte >> 4 * (index % 2) & 15
        return f"places: row {row}, block {index} keeps columns {half & 3} and {half >> 2} of 4; wanted two in ascending order"
    if fault == reference.BAD_COUNT:
        if layout.pattern is None:
            wanted = int(tensors["row_starts"][row + 1] - tensors["row_starts"][row])
            return f"places: row {row} keeps another number of columns than its {wanted} values"
        return f"places: row {row}, block {index} does not keep {layout.pattern.n} of {layout.pattern.m} columns"
    if fault == reference.BAD_PADDING:
        return f"places: row {row} has bits after its {in_features} columns"
    if fault == reference.BAD_SCALE:
        return f"scales: row {row}, group {index} is {float(tensors['scales'][row, index])}; wanted a finite number above 0"
    return (
        f"values: row {row}, value {index} is {-8 if layout.bits == 4 else -128}; wanted at least {-reference.LARGEST[layout.bits]}"
    )


def sparse_pack(
    weight: torch.Tensor,
    layout: Layout,
    name: str = "weight",
    mask: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Store a matrix [out, in]: the tensors that `layout` has.

    A block with fewer than N non-zeros keeps negative zeros and then the lowest free columns, and an unstructured matrix without a
    mask keeps all negative zeros, so that at 16 and 32 bits `sparse_expand` gives the same bits back; as in `compress24`, a negative
    zero beside N non-zeros comes back positive. Integers are rounded to the nearest.

    Args:
        weight: fp32, bf16 or fp16.
        name: the tensor's name for error messages.
        mask: bool [out, in], the kept places, N a block or fewer; without it, the non-zeros. Unstructured, exactly these are kept.
        scales: fp32 [out, groups], for weights that are already multiples of scales; without it, the largest value of a group
            becomes 127 or 7.

    Raises MaskLLMError if a block has too many non-zeros (the first row and block), or a dtype, a shape or a value does not fit.
    """
    numbers = layout.numbers
    if weight.dim() != 2 or weight.dtype not in _FLOATS.get(layout.bits, (torch.float32, torch.bfloat16, torch.float16)):
        raise MaskLLMError(f"{name}: {weight.dtype} {list(weight.shape)}; wanted [out, in] with {layout.bits} bits a value")
    weight = weight.detach().contiguous()
    if layout.quantized and not bool(weight.isfinite().all()):
        raise MaskLLMError(f"{name}: not all weights are finite; {layout.bits} bits cannot hold them")
    in_features = weight.shape[1]
    if layout.pattern is not None:
        layout.pattern.check_divides(in_features, name)
    if numbers[:2] == (2, 4) and mask is None:
        kept_values, places = compress24(weight, name)
        kept = reference.kept(places, in_features, numbers)
    else:
        kept = reference.choose(weight, layout.pattern, mask, name)
        kept_values, places = weight[kept], reference.pack_places(kept, numbers)
    tensors = {"places": places}
    if layout.quantized:
        tensors["scales"] = reference.scales_of(weight, layout.bits, layout.group_size) if scales is None else scales
        kept_values = reference.quantize(weight, tensors["scales"], layout.bits, layout.group_size)[kept]
    if layout.pattern is None:
        counts = kept.sum(1)
        tensors["row_starts"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        kept_values = kept_values.flatten()
    else:
        kept_values = kept_values.view(len(weight), -1)
    tensors["values"] = reference.pack_nibbles(kept_values) if layout.bits == 4 else kept_values
    return tensors


@torch.library.impl("maskllm::sparse_linear", "CompositeExplicitAutograd")
def _linear_reference(data, values, places, scales, row_starts, bias, n, m, bits, group_size) -> torch.Tensor:
    warn_if_reference(data.device.type)
    numbers = Numbers(n, m, bits, group_size)
    dense = reference.expand(values, places, scales, row_starts, data.shape[-1], numbers, torch.float32)
    return torch.nn.functional.linear(data.float(), dense, None if bias is None else bias.float()).to(data.dtype)


@torch.library.impl("maskllm::sparse_expand", "CompositeExplicitAutograd")
def _expand_reference(values, places, scales, row_starts, in_features, n, m, bits, group_size, dtype) -> torch.Tensor:
    return reference.expand(values, places, scales, row_starts, in_features, Numbers(n, m, bits, group_size), dtype)


@torch.library.impl("maskllm::sparse_check", "CompositeExplicitAutograd")
def _check_reference(values, places, scales, row_starts, in_features, n, m, bits, group_size) -> torch.Tensor:
    numbers = Numbers(n, m, bits, group_size)
    return torch.tensor(reference.first_fault(values, places, scales, row_starts, in_features, numbers))


@torch.library.register_fake("maskllm::sparse_linear")
def _linear_shape(data, values, places, scales, row_starts, bias, n, m, bits, group_size) -> torch.Tensor:
    return data.new_empty((*data.shape[:-1], places.shape[0]))


@torch.library.register_fake("maskllm::sparse_expand")
def _expand_shape(values, places, scales, row_starts, in_features, n, m, bits, group_size, dtype) -> torch.Tensor:
    return values.new_empty((places.shape[0], in_features), dtype=dtype)


@torch.library.register_fake("maskllm::sparse_check")
def _check_shape(values, places, scales, row_starts, in_features, n, m, bits, group_size) -> torch.Tensor:
    return torch.empty(3, dtype=torch.int64)


kernels()
