"""2:4 matrices at half size: the two kept values of each block, and their positions in the block.

Layout. `values` [out, in / 2] holds the kept elements of each row in order. `metadata`, uint8 [out, ceil(in / 8)], holds 2 bits for
each of them. Byte b of a row describes block 2b in its low half and block 2b + 1 in its high half. A half is `p0 | p1 << 2`, where
p0 < p1 are the positions (0 to 3) of the block's two values. If a row has an odd number of blocks, the high half of its last byte
is 0.

A block with fewer than two non-zeros keeps negative zeros rather than positive ones. So the round trip returns the same bits, with
one exception: a negative zero beside two non-zeros comes back positive.
"""

from __future__ import annotations

import torch

from maskllm.errors import MaskLLMError
from maskllm.ops import reference
from maskllm.ops.extension import kernels
from maskllm.ops.winner import refuse_violation
from maskllm.patterns import Pattern

_TWO_OF_FOUR = Pattern(2, 4)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)

torch.library.define("maskllm::compress24", "(Tensor matrix) -> (Tensor, Tensor, Tensor)")
torch.library.define("maskllm::decompress24", "(Tensor values, Tensor metadata) -> Tensor")


def compress24(weight: torch.Tensor, name: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """Compress a 2:4 matrix [out, in] (bf16, fp16, fp32 or int8) to (values [out, in / 2], metadata uint8 [out, ceil(in / 8)]).

    Raises MaskLLMError if a block has more than two non-zeros (the message gives `name` and the first such row and block), or if
    the dtype or shape does not fit.
    """
    if weight.dim() != 2 or weight.dtype not in _DTYPES:
        raise MaskLLMError(f"{name}: {weight.dtype} {list(weight.shape)}; wanted [out, in] of bfloat16, float16, float32 or int8")
    _TWO_OF_FOUR.check_divides(weight.shape[1], name)
    matrix = weight.detach().contiguous()
    values, metadata, first = torch.ops.maskllm.compress24(matrix)
    refuse_violation(first, matrix, _TWO_OF_FOUR, name)
    return values, metadata


def decompress24(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] from `compress24`'s values [out, in / 2] and metadata uint8 [out, ceil(in / 8)].

    Raises MaskLLMError if the shapes or dtypes do not fit together.
    """
    wanted = [values.shape[0], -(-values.shape[1] // 4)] if values.dim() == 2 and values.shape[1] % 2 == 0 else None
    if wanted is None or values.dtype not in _DTYPES or metadata.dtype != torch.uint8 or list(metadata.shape) != wanted:
        raise MaskLLMError(
            f"decompress24: values {values.dtype} {list(values.shape)} and metadata {metadata.dtype} {list(metadata.shape)}; "
            "wanted [out, in / 2] of bfloat16, float16, float32 or int8 and uint8 [out, ceil(in / 8)]"
        )
    return torch.ops.maskllm.decompress24(values.contiguous(), metadata.contiguous())


@torch.library.impl("maskllm::compress24", "CompositeExplicitAutograd")
def _compress_reference(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *reference.compress24(matrix), reference.first_violation(matrix, _TWO_OF_FOUR)


@torch.library.impl("maskllm::decompress24", "CompositeExplicitAutograd")
def _decompress_reference(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    return reference.decompress24(values, metadata)


@torch.library.register_fake("maskllm::compress24")
def _compress_shapes(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = matrix.shape
    values = matrix.new_empty((rows, columns // 2))
    return values, matrix.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8), matrix.new_empty((), dtype=torch.int64)


@torch.library.register_fake("maskllm::decompress24")
def _decompress_shapes(values: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
    return values.new_empty((values.shape[0], 2 * values.shape[1]))


kernels()
