"""Linear layers with 2:4 weights on NVIDIA GPUs (sm_80 and later): cuSPARSELt's C API, or torch's semi-structured tensors."""

from __future__ import annotations

import torch
from torch import nn

from maskllm.errors import MaskLLMError
from maskllm.ops.algorithm_cache import AlgorithmCache, algorithm_key, token_bucket
from maskllm.ops.compress24 import compress24, decompress24
from maskllm.ops.extension import kernels

_DTYPES = (torch.bfloat16, torch.float16)
_WHY_REFUSED = {
    torch.float32: " (of fp32 values the GPU keeps 1 of every 2, so a 2:4 weight would lose values)",
    torch.int8: " (an int8 product needs scales, which this layer does not have)",
}
_NEEDS = "2:4 products need an NVIDIA GPU of compute capability 8.0 or later"
_MULTIPLE = 16
"""cuSPARSELt wants a weight whose two dimensions are multiples of this."""

torch.library.define("maskllm::cusparselt_compress", "(Tensor weight) -> Tensor")
torch.library.define(
    "maskllm::cusparselt_linear",
    "(Tensor input, Tensor compressed, int out_features, Tensor? bias, str activation, int[] algorithm) -> Tensor",
)
torch.library.define(
    "maskllm::cusparselt_search", "(Tensor input, Tensor compressed, int out_features, Tensor? bias, str activation) -> int[]"
)


@torch.library.register_fake("maskllm::cusparselt_linear")
def _linear_shape(input, compressed, out_features, bias, activation, algorithm):
    return input.new_empty((input.shape[0], out_features))


def can_multiply(device: torch.device) -> bool:
    """Whether the device has 2:4 products."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in contiguous memory that starts at a multiple of 16 bytes, as cuSPARSELt wants it; copied only if it does not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


class Sparse24Linear(nn.Module):
    """`activation(input @ weight.T + bias)` with a compressed 2:4 weight. For inference only: it has no gradient.

    The GPU holds the weight in cuSPARSELt's form, whose bytes are of no use to another kind of GPU. Host memory holds it as the
    `values` and `metadata` of `compress24`. These and `bias` are the state dict. `load_state_dict`, a move to another device (`.to`,
    `.cuda`) and another dtype (`.half`, `.bfloat16`) compress the weight again. On a CPU the module can be saved but not called.

    Args:
        weight: [out, in] on a CUDA device of compute capability 8.0 or later; fp16 or bf16; `out` and `in` are multiples of 16; at
            most two non-zeros in every block of four. Other dtypes are refused: of fp32 values the GPU keeps 1 of every 2, so a 2:4
            weight would lose values, and int8 products need scales, which this layer does not have.
        bias: [out] of the weight's dtype on its device, or None.
        activation: "", "relu" or "gelu" (the tanh form), fused into the product.
        name: the tensor's name for error messages.
        cache: where `tune` stores the algorithms that it finds.

    Raises:
        MaskLLMError: the weight is not 2:4 (the message gives the first such row and block), or device, dtype or sizes do not fit.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str = "",
        name: str = "weight",
        cache: AlgorithmCache | None = None,
    ) -> None:
        super().__init__()
        self.name, self.activation = name, activation
        if not can_multiply(weight.device):
            raise MaskLLMError(f"{name}: on {weight.device}; {_NEEDS}")
        self._check_dtype(weight.dtype)
        if activation not in ("", "relu", "gelu"):
            raise MaskLLMError(f"{name}: activation {activation!r}; wanted '', 'relu' or 'gelu'")
        if weight.dim() != 2 or 0 in weight.shape or weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
            raise MaskLLMError(f"{name}: {list(weight.shape)}; wanted [out, in], both multiples of {_MULTIPLE}")
        self.out_features, self.in_features = weight.shape
        if bias is not None and (list(bias.shape), bias.dtype, bias.device) != ([self.out_features], weight.dtype, weight.device):
            raise MaskLLMError(
                f"{name}: bias {bias.dtype} {list(bias.shape)} on {bias.device}; "
                f"wanted {weight.dtype} [{self.out_features}] on {weight.device}"
            )
        values, metadata = compress24(weight, name)
        self.register_buffer("values", values.cpu())
        self.register_buffer("metadata", metadata.cpu())
        self.register_buffer("bias", None if bias is None else bias.detach())
        module = kernels()
        self.uses_cusparselt = module is not None and module.has_cusparselt
        if self.uses_cusparselt:
            self.cache = AlgorithmCache() if cache is None else cache
        self._pack(weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight, the bias, the input and the output."""
        return self.values.dtype

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in _DTYPES:
            raise MaskLLMError(f"{self.name}: {dtype}; wanted bfloat16 or float16{_WHY_REFUSED.get(dtype, '')}")

    def _pack(self, device: torch.device) -> None:
        """Compress the weight for `device`, if it can multiply."""
        self.device, self._packed = device, None
        if self.bias is not None:
            self.bias = _aligned(self.bias.to(device, self.dtype))
        if not can_multiply(device):
            return
        weight = decompress24(self.values.to(device), self.metadata.to(device))
        try:
            if self.uses_cusparselt:
                self._packed = torch.ops.maskllm.cusparselt_compress(weight)
            else:
                self._packed = torch.sparse.to_sparse_semi_structured(weight)
        except RuntimeError as error:
            raise MaskLLMError(f"{self.name}: {weight.dtype} {list(weight.shape)} cannot be compressed: {error}") from error

    def _apply(self, fn, recurse=True):
        moved = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        self._check_dtype(moved.dtype)
        changed = (moved.dtype, moved.device) != (self.dtype, self.device)
        on_host = {name: self._buffers.pop(name) for name in ("values", "metadata")}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = on_host | self._buffers
        if changed:
            self.values = self.values.to(moved.dtype)
            self._pack(moved.device)
        return self

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._check_dtype(self.dtype)
        self.values, self.metadata = self.values.cpu(), self.metadata.cpu()
        self._pack(self.device)

    def _key(self, tokens: int) -> str:
        gpu, version = torch.cuda.get_device_name(self.device), torch.backends.cusparselt.version()
        return algorithm_key(
            self.out_features,
            self.in_features,
            token_bucket(tokens),
            self.dtype,
            self.bias is not None,
            self.activation,
            gpu,
            version,
        )

    def tune(self, tokens: int) -> None:
        """Search the fastest algorithm for inputs of about `tokens` tokens and put it into the cache. Synchronizes the device.

        The search multiplies random inputs: the time of a product depends on its numbers, and zeros would be faster than data. Raises
        MaskLLMError if the module is on a device that cannot multiply.
        """
        self._require_packed()
        if not self.uses_cusparselt or self.cache.get(self._key(tokens)):
            return
        generator = torch.Generator(self.device).manual_seed(0)
        example = torch.randn(token_bucket(tokens), self.in_features, dtype=self.dtype, device=self.device, generator=generator)
        choice = torch.ops.maskllm.cusparselt_search(example, self._packed, self.out_features, self.bias, self.activation)
        self.cache.put(self._key(tokens), choice)

    def _require_packed(self) -> None:
        if self._packed is None:
            raise MaskLLMError(f"{self.name}: on {self.device}; {_NEEDS}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` [..., in] of the weight's dtype, on its device, to [..., out] of that dtype.

        Raises MaskLLMError if the input's shape, dtype or device does not fit, or the module is on a device that cannot multiply.
        """
        self._require_packed()
        if input.dim() == 0 or (input.shape[-1], input.dtype, input.device) != (self.in_features, self.dtype, self.device):
            raise MaskLLMError(
                f"{self.name}: input {input.dtype} {list(input.shape)} on {input.device}; "
                f"wanted {self.dtype} [..., {self.in_features}] on {self.device}"
            )
        shape = (*input.shape[:-1], self.out_features)
        rows = input.reshape(-1, self.in_features)
        if rows.shape[0] == 0:
            return input.new_empty(shape)
        return (self._cusparselt(rows) if self.uses_cusparselt else self._semi_structured(rows)).view(shape)

    def _cusparselt(self, rows: torch.Tensor) -> torch.Tensor:
        """The product of `rows` [tokens, in] with the tuned algorithm. An algorithm that the library refuses leaves the cache."""
        key = self._key(rows.shape[0])
        operands = (rows, self._packed, self.out_features, self.bias, self.activation)
        choice = self.cache.get(key)
        if choice:
            try:
                return torch.ops.maskllm.cusparselt_linear(*operands, choice)
            except RuntimeError as error:
                self.cache.refuse(key, error, "the default algorithm is in use until the next tune()")
        return torch.ops.maskllm.cusparselt_linear(*operands, [])

    def _semi_structured(self, rows: torch.Tensor) -> torch.Tensor:
        result = nn.functional.linear(rows, self._packed, self.bias)
        if self.activation == "relu":
            return torch.relu(result)
        if self.activation == "gelu":
            return nn.functional.gelu(result, approximate="tanh")
        return result
