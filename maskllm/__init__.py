"""MaskLLM: learn which N of every M weights of a language model to keep.

Importing it lets transformers load compressed checkpoints (docs/compressed-format.md).
"""

from maskllm.registration import register as _register

__version__ = "0.1.0"

_register()
