"""Training and validation batches, from Megatron Core's GPTDataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from maskllm.data.dataset_files import dataset_files
from maskllm.data.indexed import open_indexed
from maskllm.errors import MaskLLMError
from maskllm.families.model_config import check_vocabulary
from maskllm.training.arguments import TrainArguments


@dataclass(frozen=True)
class _Tokens:
    """The tokenizer attributes that GPTDataset reads even if the documents are already tokenized."""

    vocab_size: int
    eod: int = -1
    pad: int = -2

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}


@dataclass(frozen=True)
class Batch:
    """A micro-batch on this rank's device. Each tensor is int64 [micro-batch size, sequence length]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor


class Batches:
    """Micro-batches by global index. They depend only on the data, the seed and the index, so checkpoints need not save them.

    Micro-batch i holds the micro_batch_size samples from i * micro_batch_size, in the order of Megatron-LM's single-epoch sampler.
    """

    def __init__(self, dataset: GPTDataset, micro_batch_size: int, vocab_size: int, device: torch.device) -> None:
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.vocab_size = vocab_size
        self.device = device

    def __getitem__(self, index: int) -> Batch:
        """Return micro-batch `index`. Raises MaskLLMError if a token is outside of the model's vocabulary."""
        first = index * self.micro_batch_size
        samples = [self.dataset[first + i] for i in range(self.micro_batch_size)]
        tokens, labels, position_ids = (
            torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "position_ids")
        )
        for ids in (tokens, labels):
            check_vocabulary(ids, self.vocab_size, "--data-path")
        return Batch(*(x.to(self.device, non_blocking=True) for x in (tokens, labels, position_ids)))


class DataFiles:
    """The dataset's files and their sizes at the start, to find out whether one is lost during training.

    Training reads the files through memory maps. Reading a lost part of a map raises no error but sends the process a signal.
    """

    def __init__(self, prefixes: list[str]) -> None:
        self.sizes = {path: path.stat().st_size for prefix in prefixes for path in dataset_files(prefix)}

    def problem(self) -> str | None:
        """Return one line about the first file that is missing or has changed its size since the start, or None."""
        for path, size in self.sizes.items():
            try:
                found = path.stat().st_size
            except OSError as error:
                return f"--data-path: {path} has disappeared ({error.strerror}); put it back"
            if found != size:
                return f"--data-path: {path} has {found} bytes, it had {size} when the run started; put it back"
        return None


def build_batches(arguments: TrainArguments, vocab_size: int, device: torch.device) -> tuple[Batches, Batches | None]:
    """Build the training batches and the validation batches (None if `eval_iters` is 0). All ranks must call this.

    Raises MaskLLMError if the split leaves no text for training or validation in one of the datasets.
    """
    samples = [arguments.train_iters * arguments.global_batch_size, arguments.eval_iters * arguments.global_batch_size, 0]
    config = GPTDatasetConfig(
        random_seed=arguments.seed,
        sequence_length=arguments.seq_length,
        blend=arguments.blend(),
        split=arguments.split,
        # No cache: each rank computes the sample indices itself, which takes a second for twenty shards of C4. Upstream names its
        # cache files after the datasets, so it may load those of other data. They also exist before they are completely written.
        path_to_cache="",
        tokenizer=_Tokens(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    used = {0: "training", 1: "validation"} if arguments.eval_iters else {0: "training"}
    config.split_matrix = [bounds if part in used else None for part, bounds in enumerate(config.split_matrix)]
    for prefix in config.blend[0]:
        dataset = open_indexed(prefix)  # keep a reference: the lengths lie in memory that is mapped only while `dataset` exists
        for part, name in used.items():
            _check_not_empty(prefix, dataset.sequence_lengths, config.split_matrix[part], name, arguments.split)
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()
    return (
        Batches(train, arguments.micro_batch_size, vocab_size, device),
        Batches(valid, arguments.micro_batch_size, vocab_size, device) if arguments.eval_iters else None,
    )


def _check_not_empty(prefix: str, lengths: np.ndarray, bounds: tuple[float, float] | None, part: str, split: str) -> None:
    """Raise MaskLLMError if a part of the split has no token in a dataset. Upstream would search for its samples for ever."""
    first, last = (round(bound * float(len(lengths))) for bound in bounds) if bounds else (0, 0)
    if not lengths[first:last].any():
        advice = "change it, or set --eval-iters 0" if part == "validation" else "change it"
        raise MaskLLMError(f"--split {split}: leaves no text for {part} in {prefix}, which has {len(lengths)} documents; {advice}")
