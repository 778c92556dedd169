"""Zero-shot tasks on a Hugging Face model, computed by lm-evaluation-harness."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from lm_eval.api.model import CachingLM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from maskllm.dtypes import dtype_name
from maskllm.errors import MaskLLMError
from maskllm.evaluation.candidates import Candidate
from maskllm.evaluation.huggingface import hash_of, load_sparse_model
from maskllm.evaluation.lm_eval_tasks import Suite, quiet, seed_examples
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.loading import load_hf_tokenizer, usable_device
from maskllm.huggingface.mask_file import open_masks
from maskllm.huggingface.side_files import read_side_files

PACKAGES = ("lm-eval", "torch", "transformers", "tokenizers")
"""What computes the scores."""
CPU_BATCH = 8
"""The default batch size on a CPU. Finding the largest one takes minutes there, and larger ones are not faster."""


@dataclass(frozen=True)
class Score:
    """A metric of a task."""

    value: float
    stderr: float | None
    """The standard error over the items, as lm-eval computes it."""


@dataclass(frozen=True)
class TaskScores:
    """What lm-eval found on a task, or on a group of tasks."""

    items: int
    shots: int | None
    """Examples in each prompt; None for a group with different numbers."""
    version: str | None
    """lm-eval's version of the task's configuration."""
    truncated: int
    """Items of which a prompt is longer than the window with its answer, or with the room for one that the model writes. lm-eval cuts
    these prompts on their left."""
    metrics: dict[str, Score]
    """By lm-eval's name, without its filter if that is "none"."""


@dataclass(frozen=True)
class ModelScores:
    """A model's results, and what exactly was run."""

    label: str
    model: str
    mask: str | None
    mask_base: str | None
    weights_sha256: str | None
    """The hash of the directory's weights, before the mask (`maskllm.huggingface.weights_hash`); None without safetensors."""
    mask_sha256: str | None
    """The digest of the masks (`maskllm.huggingface.mask_file.MaskFile.digest`)."""
    dtype: str
    device: str
    zeros: float
    """The share of zeros among the weights of the transformer blocks' linear layers."""
    window: int
    """Tokens that a prompt and an answer may have together: the model's context."""
    bos: str
    """What stands before the first token of a prompt: see `_bos`."""
    batch_size: str
    seconds: float
    tasks: dict[str, TaskScores]
    correct: dict[str, np.ndarray] = field(repr=False)
    """Task -> acc of each item, fp64, in the order of the items; only for tasks that have an acc."""


def evaluate_tasks(
    candidate: Candidate,
    suite: Suite,
    *,
    limit: int | None = None,
    batch_size: int | str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    caches: list[Path] | None = None,
) -> ModelScores:
    """lm-eval's results for a model on the tasks of a suite, in one process.

    Args:
        dtype, device, trust_remote_code: as in `maskllm.evaluation.huggingface.evaluate_hf`.
        limit: the first `limit` items of each task; None for all.
        batch_size: prompts in a batch, or "auto" for the largest number that fits into memory, which lm-eval looks for. The default
            is "auto" on a GPU and CPU_BATCH on a CPU.
        caches: the file that holds the answers so far is added to it; remove the files after the report is written. None keeps no
            answers. lm-eval stores them as pickles, so the files are in the user's own cache and in no place that others can name.

    Raises MaskLLMError as `evaluate_hf` does, if the tokenizer cannot be loaded or has neither BOS nor EOS, if memory runs out, and
    if the likelihood of an answer is not a number.
    """
    started = time.perf_counter()
    label = candidate.label
    masks = open_masks(candidate.mask, candidate.mask_base)
    directory = candidate.directory or find_source(candidate.model)
    device = usable_device(device)
    tokenizer = load_hf_tokenizer(directory, trust_remote_code=trust_remote_code)
    bos = _bos(directory, tokenizer)
    weights_hash = hash_of(directory)
    mask_hash = None if masks is None else masks.digest
    loaded, zeros = load_sparse_model(directory, masks, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    seed_examples(suite)
    batch_size = batch_size or ("auto" if device.type != "cpu" else CPU_BATCH)
    with quiet(), contextlib.redirect_stdout(sys.stderr):
        harness = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)
        cache = None
        if caches is not None and weights_hash is not None:
            versions = {name: metadata.version(name) for name in PACKAGES}
            key = [weights_hash, mask_hash, dtype_name(loaded.dtype), device.type, _side_files_hash(directory), versions]
            cache = _cache_file(key)
        caching = harness if cache is None else CachingLM(harness, str(cache))
        if cache is not None:
            caches.append(cache)
        try:
            found = evaluate(caching, suite.loaded, limit=limit)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            raise MaskLLMError(
                f"{label}: out of memory with --batch-size {batch_size} on {device}; give a smaller one (or auto), and the "
                "evaluation goes on from here"
            ) from error
        finally:
            if cache is not None:
                caching.dbdict.close()
        truncated = {name: _truncated(harness, samples) for name, samples in found["samples"].items()}
    for name, samples in found["samples"].items():
        _check_numbers(label, name, samples)
    result = ModelScores(
        label=label,
        model=candidate.model,
        mask=candidate.mask,
        mask_base=candidate.mask_base,
        weights_sha256=weights_hash,
        mask_sha256=mask_hash,
        dtype=dtype_name(loaded.dtype),
        device=str(device),
        zeros=zeros,
        window=harness.max_length,
        bos=bos,
        batch_size=str(batch_size) if batch_size != "auto" else f"auto: {', '.join(map(str, harness.batch_sizes.values()))}",
        seconds=time.perf_counter() - started,
        tasks=_scores(found, truncated),
        correct={name: _correct(samples) for name, samples in found["samples"].items() if samples and "acc" in samples[0]},
    )
    del harness, caching, loaded
    gc.collect()  # the next model needs the memory
    return result


def _bos(directory: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands before a prompt: "BOS", "no BOS (...)". Raises MaskLLMError if nothing can begin an empty prompt."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise MaskLLMError(
            f"{directory}: its tokenizer has neither a BOS nor an EOS token, with which an empty prompt begins; name the one that "
            "the model was trained with as bos_token or eos_token in tokenizer_config.json"
        )
    if tokenizer.bos_token_id is None:
        return "no BOS (the tokenizer has none; an empty prompt begins with EOS)"
    return "BOS" if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else "no BOS (the tokenizer adds none)"


def _side_files_hash(directory: Path) -> str:
    found = hashlib.sha256()
    for name, contents in read_side_files(directory).items():
        found.update(f"{name}\0{len(contents)}\0".encode() + contents)
    return found.hexdigest()


def _cache_file(key: Sequence[Any]) -> Path | None:
    """The file for the answers of the model that `key` describes; None if it cannot be written, which is said."""
    folder = Path(os.environ.get("MASKLLM_CACHE_DIR", Path.home() / ".cache" / "maskllm")) / "evaluate"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        print(f"{folder}: cannot be written; an interrupted evaluation will begin again", file=sys.stderr, flush=True)
        return None
    return folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.db"


def _tokens_needed(harness: HFLM, sample: Mapping[str, Any]) -> Iterator[int]:
    """For each prompt of an item, the tokens of its window: with the answer, whose last token the model does not read, or with the
    room for an answer that it writes."""
    for arguments in sample["arguments"]:
        if len(arguments) == 2 and isinstance(arguments[1], str):
            yield len(harness.tok_encode(arguments[0] + arguments[1])) - 1
        elif len(arguments) == 2 and isinstance(arguments[1], Mapping):
            yield len(harness.tok_encode(arguments[0])) + arguments[1].get("max_gen_toks", harness.max_gen_toks)


def _truncated(harness: HFLM, samples: Sequence[Mapping[str, Any]]) -> int:
    return sum(any(tokens > harness.max_length for tokens in _tokens_needed(harness, sample)) for sample in samples)


def _check_numbers(label: str, task: str, samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise MaskLLMError at the first likelihood that is not a number: the largest of such numbers is no answer."""
    for sample in samples:
        for answers in sample["resps"]:
            if isinstance(answers[0], (tuple, list)) and not math.isfinite(answers[0][0]):
                raise MaskLLMError(
                    f"{label}: {task}: the likelihood of an answer to item {sample['doc_id']} is {answers[0][0]}; if the model "
                    "is right, compute in another dtype (--params-dtype)"
                )


def _correct(samples: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([sample["acc"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])], dtype=np.float64)


def _scores(found: Mapping[str, Any], truncated: Mapping[str, int]) -> dict[str, TaskScores]:
    """lm-eval's tasks and groups, without its aliases."""
    scores = {}
    for name, values in (found["results"] | found.get("groups", {})).items():
        metrics = {}
        for key, value in values.items():
            metric, comma, rule = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = values.get(f"{metric}_stderr,{rule}")
                shown = metric if rule == "none" else f"{metric} ({rule})"
                metrics[shown] = Score(float(value), float(error) if isinstance(error, (int, float)) else None)
        if not metrics:  # a group that lm-eval takes no mean of
            continue
        leaves = _leaves_of(found, name)
        shots = {found["n-shot"].get(leaf) for leaf in leaves}
        version = found["versions"].get(name)
        scores[name] = TaskScores(
            items=sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
            shots=shots.pop() if len(shots) == 1 else None,
            version=None if version is None else str(version),
            truncated=sum(truncated.get(leaf, 0) for leaf in leaves),
            metrics=metrics,
        )
    return scores


def _leaves_of(found: Mapping[str, Any], name: str) -> list[str]:
    children = found["group_subtasks"].get(name) or []
    return [name] if name in found["n-samples"] else [leaf for child in children for leaf in _leaves_of(found, child)]
