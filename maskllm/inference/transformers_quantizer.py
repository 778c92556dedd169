"""Compressed checkpoints in transformers: `import maskllm`, and `from_pretrained` loads them with their weights compressed.

transformers finds the loader by the name `maskllm` in `quantization_config` (`transformers.quantizers.auto`). `import maskllm` makes
this module's import follow that of transformers' registry (`maskllm.registration`). So it imports little: what a load needs
is imported by the load.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from maskllm.inference import QUANT_METHOD

_PUSH_OPTIONS = {"repo_id", "commit_message", "commit_description", "private", "revision", "create_pr", "tags"}
"""What `save_pretrained` takes for `push_to_hub` alone."""


@register_quantization_config(QUANT_METHOD)
class MaskLLMConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint. Raises MaskLLMError if it cannot be one."""

    def __init__(self, quant_method: str = QUANT_METHOD, **values: Any) -> None:
        from maskllm.inference.compressed_format import from_config

        self.quant_method = quant_method
        self.matrices = from_config({"quant_method": quant_method, **values}, "config.json")

    def to_dict(self) -> dict[str, Any]:
        """The JSON values."""
        from maskllm.inference.compressed_format import to_config

        return to_config(self.matrices)

    def to_diff_dict(self) -> dict[str, Any]:
        """The JSON values: there are no defaults."""
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class MaskLLMQuantizer(HfQuantizer):
    """Puts a `SparseLinear` in the place of each compressed matrix before weights are loaded, and checks them afterwards.

    transformers reads each stored tensor straight into its parameter, so there is never a dense copy.
    """

    requires_calibration = True  # so transformers refuses to quantize a dense model: `maskllm compress` does that

    def update_attn_implementation(self, config: Any) -> Any:
        """Take away the name of a file that is not there, before files are looked for (`mark_needs_maskllm`)."""
        if getattr(config, "transformers_weights", None) is not None:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        from transformers.pytorch_utils import Conv1D

        from maskllm.errors import MaskLLMError
        from maskllm.huggingface.parameter_names import ParameterNames
        from maskllm.huggingface.tensors import HFTensors
        from maskllm.inference.compressed_format import dense_tensors, stored_shapes
        from maskllm.inference.sparse_linear import SparseLinear

        if not checkpoint_files:
            raise MaskLLMError("a compressed checkpoint is loaded from its directory or its hub id, not from a state dict")
        paths = [Path(file) for file in checkpoint_files]
        self._tensors = HFTensors(paths[0].parent, [path.name for path in paths])
        self._names: dict[str, str] = {}
        names = ParameterNames(model)
        tensors = dense_tensors(self._tensors, self.quantization_config.matrices)
        if missing := _missing_parameters(model, names.parameters(tensors)):
            raise MaskLLMError(
                f"{paths[0].parent}: has no tensor for {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f" of {type(model).__name__}; the files are incomplete or damaged: fetch them again"
            )
        for name, matrix in self.quantization_config.matrices.items():
            shapes = stored_shapes(self._tensors, name, matrix)
            parameter = names.parameter(f"{name}.weight")
            if parameter is None:  # of a part that this class does not have: a decoder's, a head's
                continue
            path = parameter.removesuffix(".weight")
            linear = model.get_submodule(path)
            fits = isinstance(linear, Conv1D if matrix.transposed else nn.Linear)
            if not fits or tuple(linear.weight.shape) != matrix.dense_shape:
                raise MaskLLMError(
                    f"{paths[0].parent}: quantization_config has a matrix {name} {list(matrix.dense_shape)}; the model has "
                    f"{type(linear).__name__} {list(linear.weight.shape)}"
                )
            sparse = SparseLinear(matrix, linear.weight.dtype, shapes, linear.bias is not None, linear.weight.device)
            model.set_submodule(path, sparse)
            self._names[path] = name

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> nn.Module:
        from maskllm.inference.attention import use_attention
        from maskllm.inference.dense_linear import DenseLinear

        for path, module in _sparse_linears(model):
            module.requires_grad_(False)
            if module.values.is_floating_point() and module.values.element_size() > module.dtype.itemsize:
                module.dtype = module.values.dtype  # transformers keeps some weights in fp32, and T5 asks for their dtype
            name, stored = self._names[path], None
            if module.values.is_meta:  # offloaded: it is read when it is needed
                stored = {key: self._tensors.load(f"{name}.{key}") for key in module.stored()}
            module.check(f"{self._tensors.file(f'{name}.values')}: {name}", stored)
        del self._tensors
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = DenseLinear  # the same parameters, with their ties and hooks
        use_attention(model)
        model.save_pretrained = types.MethodType(save_pretrained, model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        """Called when the model is saved. Gives the matrices the names that their tensors will have in the files."""
        from transformers.core_model_loading import revert_weight_conversion

        values = {f"{path}.values": module.values for path, module in _sparse_linears(model)}
        saved = {id(tensor): name.removesuffix(".values") for name, tensor in revert_weight_conversion(model, values).items()}
        self.quantization_config.matrices = {
            saved[id(module.values)]: module.matrix_in_memory for _, module in _sparse_linears(model)
        }
        return None, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        from maskllm.inference.attention import restore_attention
        from maskllm.inference.dense_linear import DenseLinear

        if isinstance(dtype, str):  # config.dtype, of which save_pretrained makes its name
            dtype = getattr(torch, dtype)
        restore_attention(model)
        for module in model.modules():
            if isinstance(module, DenseLinear):
                module.__class__ = nn.Linear
        for path, module in list(_sparse_linears(model)):
            sizes = (module.in_features, module.out_features)
            with torch.device("meta"):
                dense = Conv1D(*sizes[::-1]) if module.matrix.transposed else nn.Linear(*sizes, bias=False)
            dense.weight = nn.Parameter(module.dense_weight(dtype))
            bias = module.bias
            dense.bias = None if bias is None else nn.Parameter(bias.data.to(dtype))
            dense.train(module.training)
            model.set_submodule(path, dense)
        del model.save_pretrained
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the compressed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """There is no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The operators are registered with their shapes."""
        return True


def _missing_parameters(model: Any, found: set[str] | None) -> list[str]:
    """The parameters that transformers would make up. A head may be new, if the checkpoint is of another class than the model.

    Args:
        found: the parameters that the checkpoint has; None if transformers alone knows.
    """
    kind = type(model).__name__
    new_head = kind not in (model.config.architectures or [])
    base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    if found is None or (new_head and not base and not kind.endswith("Model")):  # a head beside parts of the base model
        return []
    tied = model.all_tied_weights_keys
    found = found | tied.keys() | {source for target, source in tied.items() if target in found}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name, _ in model.named_parameters()
        if name not in found
        and not (new_head and not name.startswith(base))
        and not any(pattern.search(name) for pattern in ignored)
    ]


def _sparse_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from maskllm.inference.sparse_linear import SparseLinear

    return ((path, module) for path, module in model.named_modules() if isinstance(module, SparseLinear))


def save_pretrained(
    self: Any,
    save_directory: str,
    is_main_process: bool = True,
    state_dict: dict[str, torch.Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """`PreTrainedModel.save_pretrained` for a model with compressed weights.

    transformers does not write `transformers_weights`, by which the directory asks for maskllm where it is not installed. So a push
    follows the save, by `push_to_hub`, which saves in this way too.
    """
    from maskllm.files import read_json_object
    from maskllm.inference.compressed_format import mark_needs_maskllm

    of_push = {key: kwargs.pop(key) for key in _PUSH_OPTIONS & kwargs.keys()}
    repository = of_push.pop("repo_id", Path(save_directory).name)
    type(self).save_pretrained(self, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
    if not is_main_process:
        return
    mark_needs_maskllm(Path(save_directory), read_json_object(Path(save_directory) / "config.json"))
    if push_to_hub:
        sizes = {key: kwargs[key] for key in ("token", "max_shard_size") if key in kwargs}
        self.push_to_hub(repository, **of_push, **sizes)
