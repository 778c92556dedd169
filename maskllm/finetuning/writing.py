"""What translation and speech share: encoder-decoder models, which write a text for each example."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from maskllm.errors import MaskLLMError
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

    def counts(self, reference: str) -> bool:
        """Whether an example with this reference is scored."""
        return True

    @abc.abstractmethod
    def score(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """The measures by name, of examples that count."""

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel, examples: Sequence[Example], autocast: Callable[[], Any]) -> Measured:
        """What `score` says of the texts that the model writes. Raises MaskLLMError if no example counts."""
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
        scored = [output for output in outputs if self.counts(output["reference"])]
        if not scored:
            raise MaskLLMError(f"--normalizer {self.settings.normalizer}: leaves nothing of any text of the data to measure on")
        predictions, references = ([output[name] for output in scored] for name in ("prediction", "reference"))
        return Measured(self.score(predictions, references), len(scored), outputs)
