"""Perplexity with the protocol of the pruning papers (GPTQ, SparseGPT, Wanda, MaskLLM).

The text is tokenized as one string and cut into n = tokens // S windows of S tokens without overlap. The rest is dropped. In each
window the model predicts tokens 2..S from the tokens before them in the window: S - 1 predictions. Let l(i, t) be the negative
log-likelihood, in nats, of token t in window i. Then

    perplexity = exp( 1/n * sum over i of ( 1/(S-1) * sum over t of l(i, t) ) ).

The papers' code multiplies each window's mean by S and divides the total by n * S, which gives the same number. Perplexity with a
sliding window of overlapping contexts is another measure, and lower.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from maskllm.errors import MaskLLMError

WindowNLLs = Callable[[torch.Tensor], list[float]]
"""A model: maps windows, int64 [B, S] on the CPU, to the sum of the negative log-likelihoods, in nats, of S - 1 predictions for each."""

CHUNK_PREDICTIONS = 256
"""The number of predictions for which the fp32 log-softmax over the vocabulary is in memory at a time."""


@dataclass(frozen=True)
class Perplexity:
    """The result of `perplexity`."""

    perplexity: float
    nll: float
    """The mean negative log-likelihood of a prediction, in nats."""
    windows: int
    seq_length: int
    batch_size: int
    """Windows in a batch, after out-of-memory errors."""
    seconds: float


def cut_windows(tokens: np.ndarray | torch.Tensor, seq_length: int, max_windows: int | None = None) -> torch.Tensor:
    """The first `max_windows` (default: all) windows of `tokens` [text tokens], int64 [windows, seq_length].

    Raises MaskLLMError if there is no window, or if an argument is too small.
    """
    check_window(seq_length, max_windows)
    tokens = torch.as_tensor(tokens).long()
    windows = tokens[: len(tokens) // seq_length * seq_length].view(-1, seq_length)[:max_windows]
    if not len(windows):
        raise MaskLLMError(f"the text has {len(tokens)} tokens, less than one window of {seq_length}; use a smaller --seq-length")
    return windows


def check_window(seq_length: int, max_windows: int | None) -> None:
    """Raise MaskLLMError if a window has no prediction, or if there are to be no windows."""
    if seq_length < 2:
        raise MaskLLMError(f"--seq-length {seq_length}: a window needs at least 2 tokens")
    if max_windows is not None and max_windows < 1:
        raise MaskLLMError(f"--max-windows {max_windows}: wanted at least 1")


def perplexity(window_nlls: WindowNLLs, windows: torch.Tensor, batch_size: int = 1) -> Perplexity:
    """Evaluate a model on `windows`, int64 [windows, seq_length], `batch_size` at a time.

    If a batch does not fit into memory, it is tried again with half of its windows, which a line on standard error says, and so are
    all batches after it. Raises MaskLLMError if one window does not fit, or if the model's likelihood is not a number.
    """
    seq_length = windows.shape[1]
    started = time.perf_counter()
    total, done = 0.0, 0
    batch_size = min(batch_size, len(windows))
    with tqdm(total=len(windows), desc="perplexity", unit="window", disable=None) as progress:
        while done < len(windows):
            nlls = _unless_out_of_memory(window_nlls, windows[done : done + batch_size])
            if nlls is None:
                batch_size = _half(batch_size, seq_length)
                continue
            for nll in nlls:
                total += nll / (seq_length - 1)
                done += 1
                if math.isnan(total):
                    raise MaskLLMError(
                        f"the model's likelihood of window {done} is not a number; its weights or activations overflow"
                    )
            progress.update(len(nlls))
            progress.set_postfix(perplexity=f"{perplexity_of(total / done):.2f}", refresh=False)
    nll = total / len(windows)
    return Perplexity(perplexity_of(nll), nll, len(windows), seq_length, batch_size, time.perf_counter() - started)


def _unless_out_of_memory(window_nlls: WindowNLLs, batch: torch.Tensor) -> list[float] | None:
    """The batch's negative log-likelihoods; None if it does not fit into memory. The failed batch's memory is free after the return."""
    try:
        return window_nlls(batch)
    except torch.OutOfMemoryError:
        return None


def _half(batch_size: int, seq_length: int) -> int:
    """The batch size to go on with when `batch_size` windows do not fit; says so. Raises MaskLLMError for one window."""
    if batch_size == 1:
        raise MaskLLMError(
            f"out of memory with one window of {seq_length} tokens; use a smaller --seq-length, --params-dtype bf16, or another --device"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tqdm.write(f"out of memory with batches of {batch_size} windows; going on with {batch_size // 2}", file=sys.stderr)
    return batch_size // 2


def next_token_nll(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """The sum over positions t < S of -log softmax(logits[t])[tokens[t + 1]], as `token_nll` computes it.

    Args:
        logits: [S, vocabulary] of any floating-point dtype.
        tokens: int64 [S], on the same device.
    """
    return token_nll(logits[:-1], tokens[1:])


def token_nll(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """The sum over positions t of -log softmax(logits[t])[tokens[t]].

    The log-softmax is computed in fp32, a chunk of positions at a time, and summed in fp64. The arguments are those of `next_token_nll`.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows, targets in zip(logits.split(CHUNK_PREDICTIONS), tokens.split(CHUNK_PREDICTIONS), strict=True):
        total += torch.nn.functional.cross_entropy(rows.float(), targets, reduction="none").double().sum()
    return total.item()


def perplexity_of(nll: float) -> float:
    """exp of a mean negative log-likelihood, in nats; infinity beyond fp64."""
    return math.exp(nll) if nll < 700 else math.inf
