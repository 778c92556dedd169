"""Training a sparse model on transformers' `Trainer`: any model, any task, accelerate's engines."""

import importlib.util

from maskllm.errors import MaskLLMError

if importlib.util.find_spec("accelerate") is None:
    raise MaskLLMError(
        "maskllm.finetuning: accelerate is not installed, which transformers' Trainer needs; run pip install 'maskllm[finetune]'"
    )

from maskllm.finetuning.arguments import SparseTrainingArguments
from maskllm.finetuning.trainer import SparseTrainer

__all__ = ["SparseTrainer", "SparseTrainingArguments"]
