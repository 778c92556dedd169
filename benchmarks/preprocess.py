"""Speed of pre-tokenization: `maskllm preprocess` against one document at a time in a pool of processes, as in Megatron-LM.

    python -m benchmarks.preprocess [--input FILE...] [--tokenizer DIR_OR_FILE] [--workers N] [--repeat R]
        [--json FILE]

The default input is the documentation corpus of this installation. The default tokenizer is a byte-level BPE tokenizer with 32000
tokens and GPT-2's split, trained on that corpus. Loading and starting processes does not count. The two programs run in turns, the
fastest of R runs counts, and their files are compared byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import sentencepiece
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.machine import describe
from maskllm.data.preprocess import available_cores, preprocess
from maskllm.files import write_json
from maskllm.quickstart.corpus import write_documentation_corpus

_tokenize = None


def load_reference(path: Path):
    """A function from text to token ids and the vocabulary size, from the tokenizer's own library."""
    if path.suffix == ".model":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return (lambda text: [processor.bos_id(), *processor.encode(text)]), processor.vocab_size()
    tokenizer = AutoTokenizer.from_pretrained(path) if path.is_dir() else PreTrainedTokenizerFast(tokenizer_file=str(path))
    return (lambda text: tokenizer(text).input_ids), len(tokenizer)


def initialize(path: Path) -> None:
    """Load the tokenizer in a process of the pool."""
    global _tokenize
    _tokenize, _ = load_reference(path)
    _tokenize("The first call takes longer than the others.")


def encode(line: str) -> list[int]:
    """Tokenize one JSON line in a process of the pool."""
    return _tokenize(json.loads(line)["text"])


def one_document_at_a_time(inputs: list[Path], prefix: Path, tokenizer: Path, workers: int) -> float:
    """The seconds from the first line to the finished index, without the start of the pool."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(load_reference(tokenizer)[1]))
    with multiprocessing.get_context("fork").Pool(workers, initialize, (tokenizer,)) as pool:
        pool.map(encode, [json.dumps({"text": "Wait for every process."})] * 8 * workers, chunksize=1)
        started = time.perf_counter()
        for path in inputs:
            with path.open(encoding="utf-8") as lines:
                for ids in pool.imap(encode, lines, 32):
                    builder.add_document(ids, [len(ids)] if ids else [])
        builder.finalize(f"{prefix}.idx")
        return time.perf_counter() - started


def train_tokenizer(corpus: Path, directory: Path) -> Path:
    """Train a byte-level BPE tokenizer of 32000 tokens on the corpus; returns its file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    with corpus.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", metavar="FILE", help="JSON lines, not compressed")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR_OR_FILE")
    parser.add_argument("--workers", type=int, default=available_cores())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        inputs = args.input or [write_documentation_corpus(directory / "corpus").train_file]
        tokenizer = args.tokenizer or train_tokenizer(inputs[0], directory)
        ours, theirs = [], []
        for _ in range(args.repeat):
            theirs.append(one_document_at_a_time(inputs, directory / "theirs", tokenizer, args.workers))
            summary = preprocess(inputs, directory / "ours", tokenizer, workers=args.workers)
            ours.append(summary.seconds)
        for suffix in (".bin", ".idx"):
            assert filecmp.cmp(directory / f"theirs{suffix}", f"{summary.prefix}{suffix}", shallow=False), "the datasets differ"
        megabytes = summary.input_bytes / 1e6
        print(f"{describe()}, {args.workers} workers; {megabytes:.1f} MB, {summary.tokens} tokens")
        print(f"one document at a time, {args.workers} processes: {megabytes / min(theirs):8.2f} MB/s")
        print(f"maskllm preprocess, {summary.library:>11}: {megabytes / min(ours):8.2f} MB/s")
        print(f"ratio: {min(theirs) / min(ours):.1f}")
        if args.json:
            numbers = {"megabytes": megabytes, "tokens": summary.tokens, "workers": args.workers, "library": summary.library}
            speeds = {"one_document_at_a_time": megabytes / min(theirs), "maskllm": megabytes / min(ours)}
            write_json(args.json, {**numbers, "tokenizer": tokenizer.name, "megabytes_a_second": speeds})


if __name__ == "__main__":
    main()
