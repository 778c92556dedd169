"""Training a sparse model on transformers' `Trainer`: any model, any task, accelerate's engines."""

from maskllm.finetuning.arguments import SparseTrainingArguments
from maskllm.finetuning.trainer import SparseTrainer

__all__ = ["SparseTrainer", "SparseTrainingArguments"]
