"""One-shot pruning: magnitude, Wanda and SparseGPT."""

from maskllm.pruning.huggingface import PruneResult, prune_hf
from maskllm.pruning.magnitude import magnitude_mask
from maskllm.pruning.solve import METHODS, PruneSettings
from maskllm.pruning.sparsegpt import factor_hessian, sparsegpt
from maskllm.pruning.wanda import wanda_mask

__all__ = ["METHODS", "PruneResult", "PruneSettings", "factor_hessian", "magnitude_mask", "prune_hf", "sparsegpt", "wanda_mask"]
