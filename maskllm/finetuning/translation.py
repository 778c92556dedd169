"""Translation: an encoder-decoder model of text, measured by sacreBLEU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from maskllm.data.text_files import check_inputs, every_line
from maskllm.errors import MaskLLMError
from maskllm.finetuning.labels import IGNORED
from maskllm.finetuning.task import Example, padded
from maskllm.finetuning.writing import WritingTask


class TranslationTask(WritingTask):
    """Line n of the first file is the source of line n of the second. A pair of two empty lines is left out."""

    name = "translation"
    model_class = AutoModelForSeq2SeqLM
    kind = "an encoder-decoder model of text, such as T5 or Marian"
    measure_name = "bleu"
    higher_is_better = True

    def read(self, files: Sequence[str], *, for_training: bool) -> Sequence[Example]:
        """Examples with `input_ids` and `labels`, lists of tokens, and `source` and `reference`."""
        source, target = check_inputs(files)
        sources, targets = _lines(source), _lines(target)
        if len(sources) != len(targets):
            raise MaskLLMError(
                f"{source} has {len(sources)} lines and {target} has {len(targets)}; wanted a line of the second for each of the first"
            )
        for number, (ours, theirs) in enumerate(zip(sources, targets, strict=True), start=1):
            if bool(ours) != bool(theirs):
                empty, other = (target, source) if ours else (source, target)
                raise MaskLLMError(f"{empty}:{number}: is empty, but line {number} of {other} is not; wanted pairs of lines")
        pairs = [pair for pair in zip(sources, targets, strict=True) if pair[0]]
        if not pairs:
            raise MaskLLMError(f"{source}: has no text")
        sources, targets = map(list, zip(*pairs, strict=True))
        limits = {"truncation": True, "max_length": self.settings.max_length}
        inputs = self.tokenizer([self.settings.source_prefix + text for text in sources], **limits)["input_ids"]
        labels = self.tokenizer(text_target=targets, **limits)["input_ids"]
        self.check_tokens([*inputs, *labels])
        return [
            {"input_ids": tokens, "labels": wanted, "source": text, "reference": reference}
            for tokens, wanted, text, reference in zip(inputs, labels, sources, targets, strict=True)
        ]

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 [examples, tokens]."""
        return {
            "input_ids": padded([example["input_ids"] for example in examples], self.tokenizer.pad_token_id or 0),
            "attention_mask": padded([np.ones(len(example["input_ids"])) for example in examples], 0),
            "labels": padded([example["labels"] for example in examples], IGNORED),
        }

    def score(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """BLEU and chrF of the corpus."""
        from sacrebleu import corpus_bleu, corpus_chrf

        return {
            "bleu": corpus_bleu(predictions, [references]).score,
            "chrf": corpus_chrf(predictions, [references]).score,
        }

    def describe(self) -> dict[str, Any]:
        """sacreBLEU's signature, and how the text was written."""
        from sacrebleu.metrics import BLEU

        metric = BLEU()
        metric.corpus_score(["a"], [["a"]])  # the signature counts the references
        return {"sacrebleu": str(metric.get_signature()), "num_beams": self.settings.num_beams}


def _lines(path: Path) -> list[str]:
    """The lines of a file without white space at their ends. Raises MaskLLMError if it is not UTF-8."""
    lines = []
    for line in every_line(path):
        try:
            lines.append(line.data.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            raise MaskLLMError(f"{path}:{line.number}: not UTF-8: byte 0x{line.data[error.start]:02x}") from error
    return lines
