"""Sliding-window attention: which layers have a window, in a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from maskllm.families.hf_config import HFConfig

_KINDS = {"full_attention": False, "sliding_attention": True}


def read_windows(hf: HFConfig, num_layers: int, *, window: int | None, default: Callable[[int], bool]) -> dict[str, Any]:
    """The fields `window` and `windowed_layers` of `ModelConfig` for a window of `window` tokens.

    `layer_types` says which layers have it. Older configs lack this key; then `default` says it of each layer's index. Raises
    MaskLLMError that names `layer_types` if it is malformed.
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
