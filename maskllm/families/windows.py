"""Sliding-window attention: which layers have a window, in a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from maskllm.families.hf_config import HFConfig

_KINDS = {"full_attention": False, "sliding_attention": True}


def read_window_of_all_layers(hf: HFConfig, num_layers: int, *, default: int | None) -> dict[str, Any]:
    """The fields `window` and `windowed_layers` of `ModelConfig` if all layers have the window of `sliding_window` tokens.

    `default` is the family's. Null, or a default of None, means no window. Raises MaskLLMError if the key is malformed.
    """
    window = hf.nullable(hf.integer, "sliding_window", default=default)
    return {} if window is None else {"window": window, "windowed_layers": (True,) * num_layers}


def read_windows(hf: HFConfig, num_layers: int, *, window: int | None, default: Callable[[int], bool]) -> dict[str, Any]:
    """The fields `window` and `windowed_layers` of `ModelConfig` for a window of `window` tokens.

    `layer_types` says which layers have it. If an older config lacks this key, `default` says it for each layer's index. Without a
    window, or a layer that has it, there are no fields. Raises MaskLLMError that names `layer_types` if it is malformed.
    """
    if not hf.has("layer_types"):
        windowed = tuple(default(layer) for layer in range(num_layers))
    else:
        kinds = hf.values["layer_types"]
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in _KINDS for kind in map(str, kinds)):
            raise hf.error(f"layer_types is {kinds!r}; wanted {' or '.join(_KINDS)} for each of the {num_layers} layers")
        windowed = tuple(_KINDS[kind] for kind in kinds)
    if window is None or not any(windowed):
        return {}
    return {"window": window, "windowed_layers": windowed}
