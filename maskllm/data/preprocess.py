"""Pre-tokenization: JSON lines to a Megatron indexed dataset.

The files are byte for byte those of Megatron-LM's `tools/preprocess_data.py` for the same input, tokenizer and `--append-eod`:

* Every line is a document of one sequence.
* Token ids are uint16 if the vocabulary has fewer than 65500 tokens, else int32 (`DType.optimal_dtype`).
* EOD is appended to documents that have tokens.
* A document without tokens adds an entry to the document index, but no sequence, and nothing to the .bin file. (If the tokenizer
  puts BOS first, every document has tokens.)

Megatron-LM's tool tokenizes one document at a time in a pool of processes. Here threads pass whole batches to the tokenizer's
library, which works outside of Python's interpreter lock.
"""

from __future__ import annotations

import itertools
import os
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tqdm import tqdm

from maskllm.data.dataset_files import dataset_files, document_prefix
from maskllm.data.gigatoken_tokenizer import InexactError
from maskllm.data.huggingface_tokenizer import one_core_a_call
from maskllm.data.json_lines import BadLineError, document
from maskllm.data.round_trip import Fidelity, RoundTrip
from maskllm.data.text_files import Line, check_inputs, read_lines
from maskllm.data.tokenizer import load_tokenizer
from maskllm.data.tokens import TokenBatch, Tokenizer
from maskllm.errors import MaskLLMError
from maskllm.files import atomic_file, real_file

CHUNK_BYTES = 1 << 20
"""A worker gets lines in chunks of about this size."""
SAMPLED_TEXTS, SAMPLED_CHARACTERS = 16, 500
"""Up to twice as many texts of each chunk, and so many characters of each, are compared with what their tokens spell."""
REPORTED_BAD_LINES = 20
"""How many bad lines the summary quotes."""


@dataclass
class PreprocessSummary:
    """What `preprocess` wrote."""

    prefix: str
    """The dataset is `prefix`.bin and `prefix`.idx; `--data-path` takes this prefix."""
    library: str
    """The library that encoded: gigatoken, tokenizers or sentencepiece."""
    vocab_size: int
    documents: int = 0
    """Documents written, including those without tokens."""
    empty_documents: int = 0
    """Documents without tokens."""
    tokens: int = 0
    bad_lines: int = 0
    bad_line_messages: list[str] = field(default_factory=list)
    """File, line number and reason of the first REPORTED_BAD_LINES bad lines."""
    warnings: list[str] = field(default_factory=list)
    """What the tokens do not keep of a sample of the texts; see `Fidelity`."""
    input_bytes: int = 0
    """Size of the input files as they are stored."""
    seconds: float = 0.0


def available_cores() -> int:
    """How many cores this process may use. In a container or a batch job these can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class _Chunk:
    """Consecutive lines of a file, encoded."""

    path: Path
    batch: TokenBatch
    bad_lines: list[str]
    position: int
    sample: list[RoundTrip]
    """What the tokens of some of its texts spell."""


def preprocess(
    inputs: Sequence[str | os.PathLike],
    output_prefix: str | os.PathLike,
    tokenizer: str | os.PathLike,
    *,
    append_eod: bool = False,
    workers: int | None = None,
    json_key: str = "text",
    skip_bad_lines: bool = False,
) -> PreprocessSummary:
    """Tokenize JSON-lines files, in order, into `{output_prefix}_{json_key}_document.bin` and `.idx`.

    Args:
        inputs: JSON-lines files, plain, gzip or Zstandard. Lines with only white space are ignored.
        tokenizer: what `load_tokenizer` reads.
        append_eod: end every document that has tokens with the tokenizer's end-of-sequence token.
        workers: threads that tokenize; `available_cores` by default. Memory is bounded by a few chunks of CHUNK_BYTES a worker (or
            the longest line), plus 12 bytes a document for the index.
        json_key: the key of the text in a line's object.
        skip_bad_lines: count and report lines without a document; otherwise the first one raises. A file in which no line holds a
            document raises in any case: it is not what it should be.

    The two files appear complete or not at all, and replace an existing dataset. Raises MaskLLMError if an input is missing or
    damaged, a line is bad (BadLineError), the tokenizer cannot be read or lacks an end-of-sequence token that is needed, its tokens
    lose the spaces of a sample of the texts, or the input has no token.
    """
    inputs = check_inputs(inputs)
    workers = workers or available_cores()
    options = (os.fspath(tokenizer), append_eod, workers, json_key, skip_bad_lines)
    loaded = load_tokenizer(tokenizer)
    if append_eod and loaded.eod is None:
        raise MaskLLMError(
            f"{tokenizer}: the tokenizer names no end-of-sequence token to append; wanted eos_token in a tokenizer_config.json beside it"
        )
    try:
        return _preprocess(inputs, document_prefix(output_prefix, json_key), loaded, *options)
    except InexactError:
        loaded = load_tokenizer(tokenizer, use_gigatoken=False)
        tqdm.write(f"gigatoken is not exact for {tokenizer} on this input; starting over with {loaded.library}")
        return _preprocess(inputs, document_prefix(output_prefix, json_key), loaded, *options)


def _preprocess(
    inputs: list[Path],
    prefix: str,
    tokenizer: Tokenizer,
    tokenizer_name: str,
    append_eod: bool,
    workers: int,
    json_key: str,
    skip_bad_lines: bool,
) -> PreprocessSummary:
    started = time.perf_counter()
    fidelity = Fidelity()
    summary = PreprocessSummary(prefix, tokenizer.library, tokenizer.vocab_size)
    summary.input_bytes = sum(path.stat().st_size for path in inputs)
    bin_path, idx_path = dataset_files(prefix)
    # A dataset counts as complete if it has an index. So the new index is published last, and an old one is removed before the old
    # data.
    with atomic_file(idx_path) as new_idx, atomic_file(bin_path) as new_bin:
        builder = IndexedDatasetBuilder(str(new_bin), dtype=DType.optimal_dtype(tokenizer.vocab_size))
        builder.sequence_lengths, builder.document_indices = array("i"), array("q", [0])  # lists take six times the memory
        with tqdm(total=summary.input_bytes, desc="preprocess", unit="B", unit_scale=True, disable=None) as progress:
            for chunk in _with_documents(_encoded(inputs, tokenizer, append_eod, workers, json_key, skip_bad_lines)):
                fidelity.add(chunk.sample)
                fidelity.check(tokenizer_name)
                _write(builder, chunk.batch)
                summary.documents += len(chunk.batch.lengths)
                summary.empty_documents += int((chunk.batch.lengths == 0).sum())
                summary.tokens += len(chunk.batch.ids)
                summary.bad_lines += len(chunk.bad_lines)
                summary.bad_line_messages += chunk.bad_lines[: REPORTED_BAD_LINES - len(summary.bad_line_messages)]
                progress.update(chunk.position - progress.n)
        if not summary.tokens:
            raise MaskLLMError(f"{', '.join(map(str, inputs))}: no document with text, nothing to write")
        builder.finalize(str(new_idx))
        real_file(idx_path).unlink(missing_ok=True)
    summary.warnings = fidelity.warnings(tokenizer_name)
    summary.seconds = time.perf_counter() - started
    return summary


def _encoded(
    inputs: list[Path], tokenizer: Tokenizer, append_eod: bool, workers: int, json_key: str, skip_bad_lines: bool
) -> Iterator[_Chunk]:
    """The chunks of the input in order, encoded by `workers` threads. They work on at most a few chunks ahead."""

    def encode(lines: list[Line]) -> _Chunk:
        texts, bad_lines = [], []
        for line in lines:
            try:
                texts.append(document(line, json_key))
            except BadLineError as error:
                if not skip_bad_lines:
                    raise BadLineError(f"{error}; correct the line or pass --skip-bad-lines") from error
                bad_lines.append(str(error))
        batch = tokenizer.encode_batch(texts)
        sampled = texts[:: max(len(texts) // SAMPLED_TEXTS, 1)]
        sample = [tokenizer.round_trip(text[:SAMPLED_CHARACTERS]) for text in sampled]
        if append_eod:
            batch = batch.wrapped(after=[tokenizer.eod], empty=False)
        return _Chunk(lines[0].path, batch, bad_lines, lines[-1].position, sample)

    pending: deque[Future[_Chunk]] = deque()
    with one_core_a_call(), ThreadPoolExecutor(workers) as pool:
        try:
            for lines in _chunks(inputs):
                pending.append(pool.submit(encode, lines))
                while len(pending) > 2 * workers or (pending and pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _with_documents(chunks: Iterator[_Chunk]) -> Iterator[_Chunk]:
    """Pass the chunks on. Raises MaskLLMError after those of a file in which no line holds a document: it is of another form."""
    for path, of_file in itertools.groupby(chunks, key=lambda chunk: chunk.path):
        documents, bad_lines = 0, []
        for chunk in of_file:
            documents += len(chunk.batch.lengths)
            bad_lines += chunk.bad_lines[: 1 - len(bad_lines)]
            yield chunk
        if not documents:
            raise MaskLLMError(f"{path}: no line holds a document, wanted JSON lines; the first bad line: {bad_lines[0]}")


def _chunks(inputs: list[Path]) -> Iterator[list[Line]]:
    """The lines of the input in lists of about CHUNK_BYTES, each of one file."""
    for _, lines in itertools.groupby(read_lines(inputs), key=lambda line: line.path):
        chunk: list[Line] = []
        size = 0
        for line in lines:
            chunk.append(line)
            size += len(line.data)
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk


def _write(builder: IndexedDatasetBuilder, batch: TokenBatch) -> None:
    """Add each text of `batch` as a document."""
    ends = np.cumsum(batch.lengths)
    for start, end in zip((ends - batch.lengths).tolist(), ends.tolist(), strict=True):
        builder.add_document(batch.ids[start:end], [end - start] if end > start else [])
