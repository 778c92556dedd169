"""The weights of a Hugging Face directory as those of a dense model, whatever model it holds and whether it is compressed."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from maskllm.errors import MaskLLMError
from maskllm.families.hf_config import HFConfig
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import FAMILIES, find_stored, is_derived_buffer, parameter_map, tied_copies
from maskllm.files import read_json_object
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.shards import STORED_NAMES
from maskllm.huggingface.tensors import HFTensors
from maskllm.huggingface.weights_hash import WeightsHash
from maskllm.inference import QUANT_METHOD
from maskllm.inference.compressed_format import CompressedMatrix, dense_weight, from_config, stored_shapes

_FLOATS = ("F64", "F32", "F16", "BF16")

_IN_OUT_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""The model types whose blocks hold transformers' `Conv1D`, which stores a weight as [in, out]."""

_OF_A_BLOCK = re.compile(r"(^|\.)\d+\..*\.weight")
"""The names of the weights in a list of modules."""

_NO_LINEAR = re.compile(r"embed|_bias\.")
"""Matrices of a block that no activation is multiplied by: embeddings, such as the relative positions of T5."""


class _HashedTensors(HFTensors):
    """`HFTensors` that hashes each tensor when it is read first."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._hash = WeightsHash()
        self._left = set(self.names)

    def load(self, name: str) -> torch.Tensor:
        tensor = super().load(name)
        if name in self._left:
            self._hash.add(name, tensor)
            self._left.discard(name)
        return tensor

    def sha256(self) -> str:
        """The hash of all tensors. Reads those that were not read before."""
        for name in sorted(self._left):
            self.load(name)
        return self._hash.hexdigest()


class StoredWeights:
    """The tensors of a directory by the names that the model has for them; one at a time is in memory.

    The names are those of the family's parameter map if the model is of a supported family: a checkpoint of the base model alone and
    one of the whole model have the same names, and tied copies and buffers that the config determines are no tensors. All other
    tensors have the names in the files. A compressed matrix NAME is the tensor NAME.weight.
    """

    def __init__(self, model: str | Path) -> None:
        """Read config.json and the headers of `model`, a directory or a hub id.

        Raises MaskLLMError if it cannot be found or read, or if its weights are quantized otherwise than by `maskllm compress`.
        """
        self.directory = find_source(model)
        path = self.directory / "config.json"
        values = read_json_object(path)
        quantization = values.pop("quantization_config", None)
        if quantization is not None and not (isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD):
            raise MaskLLMError(f"{path}: its weights are quantized; wanted dense weights, or those that `maskllm compress` wrote")
        self._files = _HashedTensors(self.directory)
        self._compressed = {} if quantization is None else from_config(quantization, str(path))
        parts = {f"{name}.{key}" for name, matrix in self._compressed.items() for key in stored_shapes(self._files, name, matrix)}
        stored = [name for name in self._files.names if name not in parts] + [f"{name}.weight" for name in self._compressed]
        self._in_out = values.get("model_type") in _IN_OUT_MODELS
        self.config = _model_config(values, path)
        """The architecture, if it is of a supported family."""
        self._is_language_model = self.config is not None and _is_language_model(values.get("architectures"))
        self._stored = {} if self.config is None else find_stored(stored, self.config)
        self.unknown: list[str] = []
        """The tensors that a language model of this config does not have."""
        self.copies: dict[str, str] = {}
        """Copies of tied tensors that the files hold too: the name in the files -> the original's name."""
        tied = {} if self.config is None else tied_copies(self.config)
        for name in sorted(set(stored) - set(self._stored.values())):
            if name in tied:
                self.copies[name] = tied[name]
            elif self.config is None or not is_derived_buffer(name, self.config):
                if self._is_language_model:
                    self.unknown.append(name)
                else:
                    self._stored[name] = name

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._stored)

    def expected_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the config asks for; empty if it is not that of a language model of a supported family."""
        if self.config is None or not self._is_language_model:
            return {}
        return {
            name: shape
            for mapping in parameter_map(self.config)
            for name, shape in zip(mapping.hf, mapping.hf_shapes(self.config), strict=True)
        }

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        matrix = self._matrix(name)
        return self._files.shape(self._stored[name]) if matrix is None else matrix.dense_shape

    def stored_dtype(self, name: str) -> str:
        """The name that safetensors has for a tensor's dtype. For a compressed matrix it is that of the dense weight."""
        matrix = self._matrix(name)
        return self._files.stored_dtype(self._stored[name]) if matrix is None else STORED_NAMES[matrix.dtype]

    def is_rounded(self, name: str) -> bool:
        """Whether the tensor is a compressed matrix with fewer bits than the dense weight had."""
        matrix = self._matrix(name)
        return matrix is not None and matrix.layout.bits < 8 * matrix.dtype.itemsize

    def is_block_matrix(self, name: str) -> bool:
        """Whether the tensor is a matrix of a block, by its name and shape: a weight [out, in] in a list of modules."""
        return (
            len(self.shape(name)) == 2
            and self.stored_dtype(name) in _FLOATS
            and _OF_A_BLOCK.search(name) is not None
            and _NO_LINEAR.search(name) is None
        )

    def as_matrix(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, in the layout of the tensor `name`, as a matrix [out, in]; a view."""
        return weight.t() if self._in_out and _OF_A_BLOCK.search(name) is not None else weight

    def load(self, name: str) -> torch.Tensor:
        """A tensor, or one of `copies`. Raises MaskLLMError if it cannot be read, or if it is compressed and damaged."""
        stored = self._stored.get(name, name)
        module = stored.removesuffix(".weight")
        matrix = self._compressed.get(module)
        return self._files.load(stored) if matrix is None else dense_weight(self._files, module, matrix)

    def sha256(self) -> str:
        """The hash of the files' weights (`maskllm.huggingface.weights_hash`). Reads the tensors that were not read before."""
        return self._files.sha256()

    def _matrix(self, name: str) -> CompressedMatrix | None:
        """How the tensor is compressed, or None."""
        return self._compressed.get(self._stored[name].removesuffix(".weight"))


def _model_config(values: dict, path: Path) -> ModelConfig | None:
    """The architecture, or None if this program does not know the family or a feature of it: the files then speak for themselves."""
    family = FAMILIES.get(values.get("model_type"))
    try:
        return None if family is None else family.read_config(HFConfig(values, str(path)))
    except MaskLLMError:
        return None


def _is_language_model(architectures: object) -> bool:
    """Whether config.json names a causal language model, or none."""
    return not architectures or str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel"))
