"""Which parameter of a transformers model a tensor of its files is: transformers renames some of them while it loads."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


class ParameterNames:
    """The renamings of a model's loading, for the model as it is when this is made."""

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._prefix, self._parameters = model.base_model_prefix, model.state_dict()

    def parameter(self, tensor: str) -> str | None:
        """The name of the parameter that the tensor of this name becomes.

        It is None if the model has no such parameter, or if the parameter is made of several tensors or of a part of one. This
        follows transformers' `convert_and_load_state_dict_in_model`.
        """
        name, converted = self._renamed(tensor)
        return name if converted is None and name in self._parameters else None

    def parameters(self, tensors: Iterable[str]) -> set[str] | None:
        """The parameters that these tensors become; None if transformers makes a parameter of several tensors or of a part of one."""
        renamed = [self._renamed(tensor) for tensor in tensors]
        return None if any(converted is not None for _, converted in renamed) else {name for name, _ in renamed}

    def _renamed(self, tensor: str) -> tuple[str, str | None]:
        """The new name, and what names the conversion if there is one."""
        name, converted = rename_source_key(tensor, self._renamings, self._converters, self._prefix, self._parameters)
        if name not in self._parameters and tensor in self._parameters:
            name, converted = rename_source_key(tensor, [], [], self._prefix, self._parameters)
        return name, converted
