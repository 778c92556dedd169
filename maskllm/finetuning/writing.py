"""What translation and speech share: encoder-decoder models, which write a text for each example."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from maskllm.finetuning.settings import FinetuneSettings
from maskllm.finetuning.task import Example, Measured, Task, from_all_processes
from maskllm.huggingface.loading import load_hf_tokenizer


class WritingTask(Task):
    """A task whose examples have the text that is wanted as `reference`, and maybe the one that it comes from as `source`."""

    def __init__(self, directory: Path, settings: FinetuneSettings) -> None:
        super().__init__(directory, settings)
        self.tokenizer = load_hf_tokenizer(directory)

    def generation_options(self) -> dict[str, Any]:
        """What `generate` gets beside the batch."""
        return {"max_new_tokens": self.settings.max_length, "num_beams": self.settings.num_beams, "do_sample": False}

    @abc.abstractmethod
    def score(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """The measures by name."""

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel, examples: Sequence[Example], autocast: Callable[[], Any]) -> Measured:
        """What `score` says of the texts that the model writes."""
        found = {}
        for part, batch in self.batches(examples, "write", model.device):
            del batch["labels"]
            with autocast():
                tokens = model.generate(**batch, **self.generation_options())
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for (place, example), text in zip(part.items(), texts, strict=True):
                given = {name: example[name] for name in ("source", "reference") if name in example}
                found[place] = {**given, "prediction": text.strip()}
        outputs = from_all_processes(found)
        predictions, references = ([output[name] for output in outputs] for name in ("prediction", "reference"))
        return Measured(self.score(predictions, references), outputs)
