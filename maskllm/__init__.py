"""MaskLLM: learn which N of every M weights of a language model to keep."""

__version__ = "0.1.0"
