"""Using a model: text from it, and compressed checkpoints: their format, the linear that multiplies them, their loading."""

QUANT_METHOD = "maskllm"
"""The name in `quantization_config` of config.json, by which transformers finds the loader of compressed checkpoints."""
