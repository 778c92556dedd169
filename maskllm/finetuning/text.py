"""Text: a causal language model, measured by perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from maskllm.data.json_lines import document, json_object
from maskllm.data.text_files import Line, check_inputs, read_lines
from maskllm.data.tokenizer import load_tokenizer
from maskllm.errors import MaskLLMError
from maskllm.evaluation.perplexity import perplexity_of, token_nll
from maskllm.evaluation.text import read_evaluation_text
from maskllm.finetuning.labels import IGNORED
from maskllm.finetuning.settings import FinetuneSettings
from maskllm.finetuning.task import Example, Measured, Task, from_all_processes, padded
from maskllm.huggingface.loading import context_of


class TextTask(Task):
    """Documents are joined, each with the token that ends it, and cut into windows of `max_length` tokens without overlap.

    With `prompt` and `completion` a line is one example, of which only the tokens of the completion count. To measure on documents,
    they are joined and cut as `maskllm evaluate` does it.
    """

    name = "text"
    model_class = AutoModelForCausalLM
    kind = "a decoder-only language model, such as LLaMA or MPT"
    measure_name = "perplexity"
    higher_is_better = False

    def __init__(self, directory: Path, settings: FinetuneSettings) -> None:
        super().__init__(directory, settings)
        self.tokenizer = load_tokenizer(directory, use_gigatoken=False)
        if (context := context_of(self.config)) is not None and settings.max_length > context:
            raise MaskLLMError(f"--max-length {settings.max_length}: the model's context has {context} tokens")

    def read(self, files: Sequence[str], *, for_training: bool) -> Sequence[Example]:
        """Examples with `input_ids` and `labels`, int64 arrays [tokens]."""
        paths = check_inputs(files)
        kinds = {path: _kind(path) for path in paths}
        if len(set(kinds.values())) > 1:
            found = ", ".join(f"{path} has {kind}" for path, kind in kinds.items())
            raise MaskLLMError(f"files of different kinds: {found}; give files of one kind")
        examples = self._examples(paths, kinds[paths[0]], for_training=for_training)
        self.check_tokens(example["input_ids"] for example in examples)
        return examples

    def _examples(self, paths: list[Path], kind: str, *, for_training: bool) -> list[Example]:
        if kind == _PAIRS:
            return self._completions(paths)
        if for_training:
            tokens = np.concatenate([self._with_end(self.tokenizer.encode(text)) for text in self._texts(paths, kind)])
            return self._windows(tokens, paths[0])
        parts = ((self.tokenizer.encode(read_evaluation_text(path).text), path) for path in paths)
        return [window for tokens, path in parts for window in self._windows(tokens, path)]

    def _texts(self, paths: list[Path], kind: str) -> Iterator[str]:
        if kind == _DOCUMENTS:
            return (document(line, "text") for line in read_lines(paths))
        return (read_evaluation_text(path).text for path in paths)

    def _windows(self, tokens: np.ndarray, path: Path) -> list[Example]:
        length = self.settings.max_length
        windows = tokens[: len(tokens) // length * length].astype(np.int64).reshape(-1, length)
        if not len(windows):
            raise MaskLLMError(f"{path}: the text has {len(tokens)} tokens, less than one window of --max-length {length}")
        return [{"input_ids": window, "labels": window} for window in windows]

    def _with_end(self, tokens: np.ndarray) -> np.ndarray:
        end = self.tokenizer.eod
        missing = end is not None and (not len(tokens) or tokens[-1] != end)
        return np.append(tokens, [end] if missing else []).astype(np.int64)

    def _completions(self, paths: list[Path]) -> list[Example]:
        length, cut = self.settings.max_length, 0
        examples = []
        for line in read_lines(paths):
            prompt, completion = (document(line, key) for key in ("prompt", "completion"))
            if not completion:
                raise MaskLLMError(f"{line.path}:{line.number}: the completion is empty; wanted what the model is to write")
            before, whole = self.tokenizer.encode(prompt), self._with_end(self.tokenizer.encode(prompt + completion))
            # A token that has characters of both counts, and so does an end that the tokenizer puts after the prompt alone.
            same = before[: len(whole)] == whole[: len(before)]
            first = len(same) if same.all() else int(same.argmin())
            labels = whole.copy()
            labels[:first] = IGNORED
            if first >= length:
                cut += 1
                continue
            examples.append({"input_ids": whole[:length], "labels": labels[:length]})
        if not examples:
            found = f"all {cut} prompts are longer than --max-length {length}" if cut else "no examples"
            raise MaskLLMError(f"{paths[0]}: {found}")
        return examples

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, int64 [examples, tokens]."""
        end = self.tokenizer.eod
        return {
            "input_ids": padded([example["input_ids"] for example in examples], end if end is not None else 0),
            "attention_mask": padded([np.ones(len(example["input_ids"])) for example in examples], 0),
            "labels": padded([example["labels"] for example in examples], IGNORED),
        }

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel, examples: Sequence[Example], autocast: Callable[[], Any]) -> Measured:
        """The perplexity: exp of the mean, over all labels that count, of their negative log-likelihood."""
        found = {}
        for places, batch in self.batches(examples, "perplexity", model.device):
            labels = batch.pop("labels")
            with autocast():
                logits = model(**batch, use_cache=False).logits
            for place, rows, wanted in zip(places, logits[:, :-1], labels[:, 1:], strict=True):
                counted = wanted != IGNORED
                found[place] = token_nll(rows[counted], wanted[counted]), int(counted.sum())
        nlls, counts = zip(*from_all_processes(found), strict=True)
        if math.isnan(sum(nlls)):
            raise MaskLLMError("the model's likelihood of the text is not a number; its weights or activations overflow")
        return Measured({"perplexity": perplexity_of(sum(nlls) / max(1, sum(counts)))}, len(examples))


_PAIRS = "prompts and completions"
_DOCUMENTS = "documents"
_PLAIN = "plain text"


def _kind(path: Path) -> str:
    """What the first line of a file tells that it has. Raises MaskLLMError if it is empty, or JSON of another kind."""
    first = next(read_lines([path]), None)
    if first is None:
        raise MaskLLMError(f"{path}: has no text")
    if not first.data.lstrip().startswith(b"{"):
        return _PLAIN
    return _PAIRS if _has_pairs(first) else _DOCUMENTS


def _has_pairs(line: Line) -> bool:
    keys = json_object(line)
    return "text" not in keys and ("prompt" in keys or "completion" in keys)
