"""The entry point by which vLLM finds this project (`vllm.general_plugins` in pyproject.toml).

vLLM calls `register` in each of its processes. The classes that know vLLM are in `maskllm.inference.vllm_layers`.
"""

from __future__ import annotations

import importlib
import logging

from maskllm.environment.optional_parts import vllm
from maskllm.errors import MaskLLMError, first_line

_log = logging.getLogger("vllm.plugins.maskllm")  # vLLM prints what is below "vllm"


def register() -> None:
    """Tell vLLM how to serve compressed checkpoints.

    If this vLLM has other classes than the plugin needs, or the kernels do not fit its torch, a warning says so, and vLLM serves all
    other models as ever.
    """
    part = vllm()
    if part.problem is not None:
        _log.warning("maskllm: %s", part.problem)
    try:
        importlib.import_module("maskllm.inference.vllm_layers")
    except MaskLLMError as error:
        _log.warning("maskllm: compressed checkpoints cannot be served: %s", error)
    except (ImportError, AttributeError, TypeError) as error:
        _log.warning(
            "maskllm: compressed checkpoints cannot be served, for vLLM %s does not fit (%s)", part.version, first_line(error)
        )
