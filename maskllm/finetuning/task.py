"""What a task is to a run: examples from files, batches for the model, and a measure of what the model makes of them."""

from __future__ import annotations

import abc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import distributed as dist
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from maskllm.distributed import is_first_rank, rank_and_size
from maskllm.errors import MaskLLMError, whole_message
from maskllm.families.model_config import check_vocabulary
from maskllm.finetuning.settings import FinetuneSettings
from maskllm.huggingface.config import load_config

Example = dict[str, Any]
"""What `Task.collate` makes batches of, one item of a batch."""


@dataclass(frozen=True)
class Measured:
    """What a model scores on examples."""

    measures: dict[str, float]
    """By name; the first is the task's own."""
    examples: int
    """How many examples they come from."""
    outputs: list[dict[str, str]] = field(default_factory=list)
    """What the model wrote, with what was wanted: source (if it is text), reference, prediction."""


class Task(abc.ABC):
    """A task, with the tokenizer of the model that does it. Its subclasses read the data of one task each."""

    name: ClassVar[str]
    model_class: ClassVar[type]
    """transformers' class of automatic models."""
    kind: ClassVar[str]
    """What `model_class` loads, in words."""
    measure_name: ClassVar[str]
    higher_is_better: ClassVar[bool]

    def __init__(self, directory: Path, settings: FinetuneSettings) -> None:
        """`directory` is the model's, and `settings` are complete.

        Raises MaskLLMError if the model is of a kind that cannot do the task, or if its tokenizer cannot be read.
        """
        self.directory, self.settings = directory, settings
        try:
            self.config = load_config(directory)
        except MaskLLMError:
            raise
        except Exception as error:  # transformers raises many types
            raise MaskLLMError(f"{directory}: transformers cannot read its config.json: {whole_message(error)}") from error
        self._check_kind()

    def _check_kind(self) -> None:
        # In transformers a decoder of an encoder-decoder model counts as a causal language model, and some decoder-only models of sound
        # (Voxtral, Qwen2-Audio) as models of speech and even of text to text.
        causal = self.name == "text"
        if type(self.config) not in self.model_class._model_mapping or causal == self.config.is_encoder_decoder:
            raise MaskLLMError(f"--task {self.name}: {self.directory} is a {self.config.model_type} model; wanted {self.kind}")

    @abc.abstractmethod
    def read(self, files: Sequence[str], *, for_training: bool) -> Sequence[Example]:
        """The examples of files. Raises MaskLLMError naming the file and the line of what cannot be used, and if there are none."""

    @abc.abstractmethod
    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """A batch: the model's inputs, with `labels` of which IGNORED do not count."""

    @abc.abstractmethod
    def measure(self, model: PreTrainedModel, examples: Sequence[Example], autocast: Callable[[], Any]) -> Measured:
        """What `model`, which is in evaluation mode, scores on all examples; the processes share them and return the same.

        `autocast` makes the context in which the model computes.
        """

    def check_tokens(self, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Raise MaskLLMError if the model's vocabulary does not have all tokens."""
        size = self.config.get_text_config().vocab_size
        for row in rows:
            if len(row):
                check_vocabulary(np.asarray(row), size, f"{self.directory}'s tokenizer")

    def describe(self) -> dict[str, Any]:
        """How it was measured: JSON values for the report."""
        return {}

    def batches(
        self, examples: Sequence[Example], what: str, device: torch.device
    ) -> Iterator[tuple[dict[int, Example], dict[str, torch.Tensor]]]:
        """This process's part of the examples, by their places, with the batch that they make; and progress on standard error: a bar on a
        terminal, else ten lines."""
        rank, ranks = rank_and_size()
        mine, size = range(rank, len(examples), ranks), self.settings.per_device_eval_batch_size
        starts = range(0, len(mine), size)
        progress = tqdm(starts, desc=what, unit="batch", disable=None if is_first_rank() else True, leave=False)
        for number, start in enumerate(progress, start=1):
            part = {place: examples[place] for place in mine[start : start + size]}
            yield part, {name: tensor.to(device) for name, tensor in self.collate(list(part.values())).items()}
            if progress.disable and is_first_rank() and number * 10 // len(starts) > (number - 1) * 10 // len(starts):
                print(f"{what}: batch {number} of {len(starts)}", file=sys.stderr, flush=True)


def padded(rows: Sequence[Any], value: int) -> torch.Tensor:
    """Rows of tokens as int64 [rows, longest], with `value` after the shorter ones."""
    return pad_sequence([torch.as_tensor(row, dtype=torch.long) for row in rows], batch_first=True, padding_value=value)


def from_all_processes(found: dict[int, Any]) -> list[Any]:
    """What the processes found for the places of examples, in the order of the places, on each of them."""
    parts = [found]
    if dist.is_initialized():
        parts = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, found)
    together = {place: value for part in parts for place, value in part.items()}
    return [together[place] for place in sorted(together)]
