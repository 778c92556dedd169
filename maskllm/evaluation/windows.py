"""The windows of a held-out text on which perplexity is measured, cut as the pruning papers' scripts cut them."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from maskllm.data.tokens import Tokenizer
from maskllm.errors import MaskLLMError
from maskllm.evaluation.perplexity import check_window, cut_windows
from maskllm.evaluation.text import read_documents, read_evaluation_text

C4_WINDOWS = 256
C4_SEED = 0


@dataclass(frozen=True)
class TextWindows:
    """The windows of a text."""

    windows: torch.Tensor
    """int64 [windows, seq_length]"""
    tokens: np.ndarray
    """All tokens of the text; with the format "c4", those of the windows."""
    kind: str
    """How the text was read: `EvaluationText.kind`, or for "c4" the rule and the seed."""


def read_windows(
    data: str | os.PathLike, tokenizer: Tokenizer, seq_length: int, *, max_windows: int | None = None, data_format: str = "auto"
) -> TextWindows:
    """The first `max_windows` (default: all) windows of `seq_length` tokens of the text file `data`.

    * "auto" and "ptb": the tokens of the whole text (`read_evaluation_text`), cut without overlap.
    * "c4": C4_WINDOWS windows of random documents, as `get_c4` of GPTQ's scripts draws them (see `draw_windows`).
    * "c4-new": the same of the joined text of the first documents, at most C4_WINDOWS windows: `get_c4` of SparseGPT's and Wanda's
      scripts, `get_c4_new` of GPTQ's.

    Raises MaskLLMError as `read_evaluation_text`, `cut_windows` and `draw_windows` do.
    """
    check_window(seq_length, max_windows)
    if data_format == "c4":
        count = min(C4_WINDOWS, max_windows or C4_WINDOWS)
        windows = draw_windows(read_documents(data), tokenizer, seq_length, count, str(data))
        return TextWindows(windows, windows.flatten().numpy(), f"c4: random documents, seed {C4_SEED}")
    text = read_evaluation_text(data, data_format)
    tokens = tokenizer.encode(text.text)
    if data_format == "c4-new":
        max_windows = min(C4_WINDOWS, max_windows or C4_WINDOWS)
    return TextWindows(cut_windows(tokens, seq_length, max_windows), tokens, text.kind)


def draw_windows(documents: list[str], tokenizer: Tokenizer, seq_length: int, count: int, source: str) -> torch.Tensor:
    """`count` windows of random documents, int64 [count, seq_length], as GPTQ's `get_c4` draws the windows of C4's validation set.

    Python's generator with the seed C4_SEED draws documents, with replacement, until one has more than `seq_length` tokens (BOS included);
    then it draws the window's start, from 0 to tokens - seq_length - 1. (The scripts fail at a document of exactly `seq_length`
    tokens; here it is passed over.)

    Raises MaskLLMError, which names `source`, if no document is long enough.
    """
    generator = random.Random(C4_SEED)
    lengths: dict[int, int] = {}
    windows = []
    with tqdm(total=count, desc="draw windows", unit="window", disable=None, leave=False) as progress:
        while len(windows) < count:
            index = generator.randint(0, len(documents) - 1)
            if lengths.get(index, seq_length + 1) <= seq_length:
                continue
            tokens = torch.as_tensor(np.asarray(tokenizer.encode(documents[index]))).long()
            lengths[index] = len(tokens)
            if len(tokens) > seq_length:
                start = generator.randint(0, len(tokens) - seq_length - 1)
                windows.append(tokens[start : start + seq_length])
                progress.update()
            elif len(lengths) == len(documents) and max(lengths.values()) <= seq_length:
                raise MaskLLMError(
                    f"{source}: none of its {len(documents)} documents has more than {seq_length} tokens; use a smaller --seq-length, or "
                    "a shard of C4's validation set"
                )
    return torch.stack(windows)
