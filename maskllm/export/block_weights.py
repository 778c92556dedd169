"""The matrices of a dense checkpoint that can be compressed: the linears of its blocks, after a mask file."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from maskllm.errors import MaskLLMError, whole_message
from maskllm.huggingface.blocks import block_linears
from maskllm.huggingface.config import load_config
from maskllm.huggingface.mask_file import MaskFile
from maskllm.huggingface.parameter_names import ParameterNames
from maskllm.huggingface.tensors import HFTensors


class BlockWeights:
    """The weights of the blocks' linears, by the names of their tensors in the files.

    A weight that several modules share is none of them, and neither is one that transformers makes of several tensors.

    Raises MaskLLMError if transformers does not have the model's architecture or cannot make it, if a tensor has another shape than
    config.json gives it, and if the masks do not fit.
    """

    def __init__(self, directory: Path, tensors: HFTensors, masks: MaskFile | None) -> None:
        self.tensors, self._masks = tensors, masks
        self._found = _find(directory, tensors)
        """The model's name of the parameter, and whether it is [in, out]."""
        if masks is not None:
            masks.check({parameter: tensors.shape(tensor) for tensor, (parameter, _) in self._found.items()})

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return list(self._found)

    def transposed(self, tensor: str) -> bool:
        """Whether a weight is stored as [in, out]."""
        return self._found[tensor][1]

    def load(self, tensor: str) -> torch.Tensor:
        """Read any tensor as it is stored; a weight of a block after its mask."""
        loaded = self.tensors.load(tensor)
        if self._masks is None or tensor not in self._found:
            return loaded
        return loaded.masked_fill(~self._masks.mask(self._found[tensor][0], tuple(loaded.shape)), 0)

    def matrix(self, tensor: str) -> torch.Tensor:
        """A weight of a block as [out, in], after its mask."""
        weight = self.load(tensor)
        return weight.t().contiguous() if self.transposed(tensor) else weight


def _find(directory: Path, tensors: HFTensors) -> dict[str, tuple[str, bool]]:
    config = load_config(directory)
    names = config.architectures or ["none"]
    architecture = getattr(transformers, names[0], None)
    if architecture is None:
        raise MaskLLMError(f"{directory / 'config.json'}: architectures is {names[0]}; wanted one that transformers has")
    try:
        with torch.device("meta"):
            model = architecture(config)
    except Exception as error:  # transformers raises many types for values that do not fit together
        raise MaskLLMError(f"{directory}: transformers cannot make its model: {whole_message(error)}") from error
    linears = {f"{name}.weight": linear for name, linear in block_linears(model).items()}
    parameters = ParameterNames(model)
    found = {}
    for tensor in tensors.names:
        parameter = parameters.parameter(tensor)
        if parameter in linears and tensor.endswith(".weight"):
            linear = linears[parameter]
            if tensors.shape(tensor) != tuple(linear.weight.shape):
                raise MaskLLMError(
                    f"{tensors.file(tensor)}: {tensor} is {list(tensors.shape(tensor))}; config.json has {list(linear.weight.shape)}"
                )
            found[tensor] = (parameter, not isinstance(linear, torch.nn.Linear))
    return found
