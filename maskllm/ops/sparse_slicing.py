"""Rows and columns of a stored matrix, and several matrices as one: what tensor parallelism and fused linears need.

The tensors are those of `maskllm.ops.sparse_linear`, checked (`sparse_check`). No dense matrix is made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from maskllm.ops import sparse_reference as reference
from maskllm.ops.sparse_linear import Layout

Tensors = dict[str, torch.Tensor]


def sparse_rows(tensors: Tensors, layout: Layout, first: int, last: int) -> Tensors:
    """The rows `first` to `last - 1`. The tensors may be views."""
    rows = {key: tensor[first:last] for key, tensor in tensors.items() if key not in ("values", "row_starts")}
    if layout.pattern is not None:
        return rows | {"values": tensors["values"][first:last]}
    row_starts = tensors["row_starts"]
    begin, end = int(row_starts[first]), int(row_starts[last])
    values = _unpacked(tensors["values"], layout, int(row_starts[-1]))[begin:end]
    return rows | {"row_starts": row_starts[first : last + 1] - begin, "values": _packed(values, layout)}


def sparse_columns(tensors: Tensors, layout: Layout, in_features: int, first: int, last: int) -> tuple[Tensors, Layout]:
    """The columns `first` to `last - 1` of a matrix with `in_features` columns, and their layout.

    It is the matrix's own layout with two exceptions. Columns that begin or end inside a block are unstructured. If a group of scales
    is cut, the groups become smaller: their size is the greatest common divisor of the old size and `first`.
    """
    if (first, last) == (0, in_features):
        return tensors, layout
    pattern, group_size, numbers = layout.pattern, layout.group_size, layout.numbers
    if pattern is not None and (first % pattern.m or last % pattern.m):
        pattern = None
    result = {}
    if layout.quantized:
        scales = tensors["scales"]
        if group_size != -1:
            group_size = math.gcd(group_size, first)
            groups = torch.arange(first, last, group_size, device=scales.device) // layout.group_size
            scales = scales[:, groups]
        result["scales"] = scales
    new = dataclasses.replace(layout, pattern=pattern, group_size=group_size)
    kept = reference.kept(tensors["places"], in_features, numbers)
    inside = torch.zeros(in_features, dtype=torch.bool, device=kept.device)
    inside[first:last] = True
    count = int(tensors["row_starts"][-1]) if layout.pattern is None else in_features // layout.pattern.m * layout.pattern.n
    values = _unpacked(tensors["values"], layout, count).flatten()[inside.expand_as(kept)[kept]]
    kept = kept[:, first:last]
    result["places"] = reference.pack_places(kept, new.numbers)
    if pattern is None:
        result["row_starts"] = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    else:
        values = values.view(len(kept), -1)
    result["values"] = _packed(values, new)
    return result, new


def sparse_stack(matrices: Sequence[Tensors], layout: Layout) -> Tensors:
    """The rows of all matrices, which have the same layout, the same number of columns and the same dtypes, as one matrix."""
    if len(matrices) == 1:
        return matrices[0]
    result = {key: torch.cat([tensors[key] for tensors in matrices]) for key in matrices[0] if key not in ("values", "row_starts")}
    if layout.pattern is not None:
        return result | {"values": torch.cat([tensors["values"] for tensors in matrices])}
    counts = torch.cat([tensors["row_starts"].diff() for tensors in matrices])
    values = torch.cat([_unpacked(tensors["values"], layout, int(tensors["row_starts"][-1])) for tensors in matrices])
    return result | {"row_starts": torch.nn.functional.pad(counts.cumsum(0), (1, 0)), "values": _packed(values, layout)}


def _unpacked(values: torch.Tensor, layout: Layout, count: int) -> torch.Tensor:
    """The `count` values in the last dimension, one an element."""
    return reference.unpack_nibbles(values, count) if layout.bits == 4 else values


def _packed(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    return reference.pack_nibbles(values) if layout.bits == 4 else values
