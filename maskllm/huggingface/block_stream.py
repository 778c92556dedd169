"""A causal language model whose blocks are read when they are needed: the weights of one block are in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from maskllm.errors import MaskLLMError, whole_message
from maskllm.huggingface.blocks import block_stacks
from maskllm.huggingface.config import load_config
from maskllm.huggingface.loading import quiet_transformers
from maskllm.huggingface.parameter_names import ParameterNames
from maskllm.huggingface.tensors import HFTensors


class BlockStream:
    """The model of a Hugging Face directory up to its last block: the output layer stays on the meta device.

    Args:
        directory: with config.json.
        tensors: of the directory.
        dtype: to compute in.
        device: to compute on.
        load: reads a tensor by its name in the files, in the shape in which it is stored.

    Raises MaskLLMError if transformers cannot make the model or it has not one stack of blocks, or if a parameter is not one tensor
    of the files: transformers makes some of several tensors.
    """

    def __init__(
        self,
        directory: Path,
        tensors: HFTensors,
        *,
        dtype: torch.dtype,
        device: torch.device,
        load: Callable[[str], torch.Tensor],
    ) -> None:
        self.directory, self.device, self._dtype, self._load = directory, device, dtype, load
        try:
            with quiet_transformers(), _parameters_on_meta():
                self.model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(directory), dtype=dtype).eval()
        except Exception as error:  # transformers raises many types for values that do not fit together
            raise MaskLLMError(
                f"{directory}: transformers cannot make a causal language model of it: {whole_message(error)}"
            ) from error
        stacks = block_stacks(self.model)
        if len(stacks) > 1:
            raise MaskLLMError(f"{directory}: has the stacks of blocks {', '.join(stacks)}; wanted a model of text with one")
        ((stack, blocks),) = stacks.items()
        self.blocks: dict[str, nn.Module] = {f"{stack}.{index}": block for index, block in enumerate(blocks)}
        """By name."""
        names = ParameterNames(self.model)
        self._tensors = {parameter: tensor for tensor in tensors.names if (parameter := names.parameter(tensor)) is not None}
        for module in self.model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(device)
        in_blocks = {module for block in self.blocks.values() for module in block.modules()}
        base = self.model.base_model
        self._fill([module for module in base.modules() if module not in in_blocks])

    def tensor(self, parameter: str) -> str:
        """The name in the files of a parameter of the model. Raises MaskLLMError if it is made of several tensors, or of none."""
        if parameter not in self._tensors:
            raise MaskLLMError(f"{self.directory}: {parameter} is not one tensor of its files, so its block cannot be loaded alone")
        return self._tensors[parameter]

    @contextlib.contextmanager
    def loaded(self, block: nn.Module) -> Iterator[None]:
        """A block of code in which the weights of a block of the model are in memory."""
        modules = list(block.modules())
        self._fill(modules)
        try:
            yield
        finally:
            for module in modules:
                for key, parameter in module.named_parameters(recurse=False):
                    module._parameters[key] = _on_meta(parameter)

    @contextlib.contextmanager
    def running(self) -> Iterator[PreTrainedModel]:
        """A block of code in which the model can run: a block of the model is loaded when it is reached, and frees the one before."""
        with contextlib.ExitStack() as loaded:

            def load(block: nn.Module, _: tuple) -> None:
                loaded.close()
                loaded.enter_context(self.loaded(block))

            handles = [block.register_forward_pre_hook(load) for block in self.blocks.values()]
            try:
                yield self.model
            finally:
                for handle in handles:
                    handle.remove()

    def _fill(self, modules: list[nn.Module]) -> None:
        """Read the parameters and buffers that these modules have themselves."""
        paths = {module: path for path, module in self.model.named_modules()}
        for module in modules:
            path = paths[module]
            for kind, entries in (("parameter", module._parameters), ("buffer", module._buffers)):
                for key, old in entries.items():
                    name = f"{path}.{key}" if path else key
                    if old is None or (
                        kind == "buffer" and (key in module._non_persistent_buffers_set or name not in self._tensors)
                    ):
                        continue
                    tensor = self._load(self.tensor(name))
                    if tensor.shape != old.shape:
                        raise MaskLLMError(f"{self.directory}: {name} is {list(tensor.shape)}; config.json has {list(old.shape)}")
                    tensor = tensor.to(self.device, self._dtype if tensor.is_floating_point() else None)
                    entries[key] = nn.Parameter(tensor, requires_grad=False) if kind == "parameter" else tensor


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """A block that makes modules with real buffers, but with parameters on the meta device, which take no memory."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else _on_meta(parameter))

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
