"""Linear layers with 2:4 weights on NVIDIA GPUs (sm_80 and later): cuSPARSELt's C API, or torch's semi-structured tensors."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import torch
from torch import nn

from maskllm.errors import MaskLLMError
from maskllm.files import write_json
from maskllm.ops.extension import kernels
from maskllm.ops.winner import check_mask
from maskllm.patterns import Pattern

# Sizes that cuSPARSELt accepts: multiples of these for the sparse weight's dimensions, and for the tokens of the dense input.
_MULTIPLES = {torch.float16: (16, 8), torch.bfloat16: (16, 8), torch.float32: (8, 4), torch.int8: (32, 16)}

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


class AlgorithmCache:
    """The fastest cuSPARSELt algorithm of each product, in a JSON file that later runs read.

    A key holds everything that the choice depends on: shape, dtype, bias, activation, GPU and library version. The file is
    `$MASKLLM_CACHE_DIR/cusparselt.json`; the default folder is `~/.cache/maskllm`. Raises MaskLLMError if the file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        folder = Path(os.environ.get("MASKLLM_CACHE_DIR", Path.home() / ".cache" / "maskllm"))
        self.path = folder / "cusparselt.json" if path is None else path
        self._choices: dict[str, list[int]] = self._read()

    def _read(self) -> dict[str, list[int]]:
        if not self.path.exists():
            return {}
        try:
            choices = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MaskLLMError(f"{self.path}: not JSON ({error}); delete it, and new searches will write it again") from error
        for key, choice in choices.items() if isinstance(choices, dict) else [("the file", choices)]:
            if not (isinstance(choice, list) and len(choice) == 4 and all(isinstance(number, int) for number in choice)):
                raise MaskLLMError(
                    f"{self.path}: {key}: wanted a list of four integers; delete the file, and new searches will write it again"
                )
        return choices

    def get(self, key: str) -> list[int]:
        """The algorithm found for `key`, or an empty list, which means the library's default."""
        return self._choices.get(key, [])

    def put(self, key: str, choice: list[int]) -> None:
        """Store an algorithm and write the file, including what other processes have added in the meantime."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file releases the lock
            self._choices = self._read() | self._choices | {key: list(choice)}
            write_json(self.path, self._choices)


def token_bucket(tokens: int, multiple: int) -> int:
    """The number of tokens to search an algorithm for: the next power of two, at least `multiple`. Few searches serve all sizes."""
    return max(multiple, 1 << (tokens - 1).bit_length()) if tokens > 1 else multiple


def algorithm_key(
    out_features: int, in_features: int, tokens: int, dtype: torch.dtype, bias: bool, activation: str, gpu: str, version: int
) -> str:
    """The key of a product in the cache. `tokens` comes from `token_bucket`."""
    return f"{out_features}x{in_features}x{tokens} {dtype} bias={int(bias)} activation={activation or 'none'} {gpu} cuSPARSELt {version}"


class Sparse24Linear(nn.Module):
    """`activation(input @ weight.T + bias)` with a compressed 2:4 weight. For inference only: it has no gradient.

    Args:
        weight: [out, in] on a CUDA device of compute capability 8.0 or later; fp16, bf16, fp32 (multiplied as TF32) or int8; at
            most two non-zeros in every block of four.
        bias: [out] of the weight's dtype, or None.
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
        if weight.device.type != "cuda" or torch.cuda.get_device_capability(weight.device) < (8, 0):
            raise MaskLLMError(f"{name}: on {weight.device}; 2:4 products need an NVIDIA GPU of compute capability 8.0 or later")
        if weight.dtype not in _MULTIPLES:
            raise MaskLLMError(f"{name}: {weight.dtype}; wanted one of {', '.join(map(str, _MULTIPLES))}")
        if activation not in ("", "relu", "gelu"):
            raise MaskLLMError(f"{name}: activation {activation!r}; wanted '', 'relu' or 'gelu'")
        multiple = _MULTIPLES[weight.dtype][0]
        if weight.dim() != 2 or weight.shape[0] % multiple or weight.shape[1] % multiple:
            raise MaskLLMError(f"{name}: {list(weight.shape)}; for {weight.dtype} wanted [out, in], both multiples of {multiple}")
        check_mask(weight, Pattern(2, 4), name)
        self.out_features, self.in_features = weight.shape
        self.dtype, self.activation = weight.dtype, activation
        self.register_buffer("bias", bias)
        module = kernels()
        self.uses_cusparselt = module is not None and module.has_cusparselt
        if self.uses_cusparselt:
            self.cache = AlgorithmCache() if cache is None else cache
            self.register_buffer("compressed", torch.ops.maskllm.cusparselt_compress(weight.detach().contiguous()))
        else:
            self.compressed = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())

    def _key(self, tokens: int) -> str:
        bucket = token_bucket(tokens, _MULTIPLES[self.dtype][1])
        device = torch.cuda.get_device_name(self.compressed.device)
        version = torch.backends.cusparselt.version()
        return algorithm_key(
            self.out_features, self.in_features, bucket, self.dtype, self.bias is not None, self.activation, device, version
        )

    def tune(self, tokens: int) -> None:
        """Search the fastest algorithm for inputs of about `tokens` tokens and put it into the cache. Synchronizes the device."""
        if not self.uses_cusparselt or self.cache.get(self._key(tokens)):
            return
        bucket = token_bucket(tokens, _MULTIPLES[self.dtype][1])
        example = torch.zeros(bucket, self.in_features, dtype=self.dtype, device=self.compressed.device)
        choice = torch.ops.maskllm.cusparselt_search(example, self.compressed, self.out_features, self.bias, self.activation)
        self.cache.put(self._key(tokens), choice)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map `input` [..., in] of the weight's dtype to [..., out]."""
        rows = input.reshape(-1, self.in_features)
        if not self.uses_cusparselt:
            result = nn.functional.linear(rows, self.compressed, self.bias)
            if self.activation == "relu":
                result = torch.relu(result)
            elif self.activation == "gelu":
                result = nn.functional.gelu(result, approximate="tanh")
            return result.view(*input.shape[:-1], self.out_features)
        tokens = rows.shape[0]
        padding = -tokens % _MULTIPLES[self.dtype][1]
        padded = nn.functional.pad(rows, (0, 0, 0, padding)).contiguous()
        algorithm = self.cache.get(self._key(tokens))
        result = torch.ops.maskllm.cusparselt_linear(
            padded, self.compressed, self.out_features, self.bias, self.activation, algorithm
        )
        return result[:tokens].view(*input.shape[:-1], self.out_features)
