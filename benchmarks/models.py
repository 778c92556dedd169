"""Models with random weights, which a benchmark makes once and keeps."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from maskllm.errors import MaskLLMError
from maskllm.patterns import Pattern
from maskllm.processes import end_with_parent

TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
"""The sizes of TinyLlama 1.1B, by the names of its configuration."""
_OPTIONS = dict(zip(("hidden", "mlp", "layers", "heads", "kv_heads", "vocabulary"), TINYLLAMA, strict=True))


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each size of a LLaMA: `--hidden`, `--mlp` and so on. The defaults are TinyLlama's."""
    for option, key in _OPTIONS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=TINYLLAMA[key], metavar="N")


def sizes_of(arguments: argparse.Namespace) -> dict[str, int]:
    """The sizes that the options of `add_size_options` have given, by the names of the configuration."""
    return {key: getattr(arguments, option) for option, key in _OPTIONS.items()}


def made(directory: Path, make: Callable[[Path], Any]) -> Path:
    """`directory`, which `make` writes if it is not there. A directory that is there is complete."""
    if not directory.exists():
        unfinished = directory.with_name(f"{directory.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"making {directory}", flush=True)
        make(unfinished)
        unfinished.rename(directory)
    return directory


def compress(sparse: Path, bits: int, directory: Path) -> None:
    """Write the compressed model, by the command that users have. It ends with this process."""
    words = [sys.executable, "-m", "maskllm", "compress", "--model", sparse, "--bits", bits, "--output", directory]
    ends = functools.partial(end_with_parent, os.getpid(), signal.SIGTERM)
    subprocess.run(list(map(str, words)), check=True, preexec_fn=ends)


def write_word_tokenizer(directory: Path, vocabulary: int) -> None:
    """A tokenizer with the words t0, t1 and so on."""
    tokenizer = Tokenizer(models.WordLevel({f"t{number}": number for number in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="t0", eos_token="t1").save_pretrained(directory)


def keep(weight: torch.Tensor, pattern: Pattern) -> None:
    """Set all but the N largest of every M weights in a row to zero."""
    blocks = weight.view(-1, pattern.m)
    blocks.scatter_(1, blocks.abs().argsort(1)[:, : pattern.m - pattern.n], 0)


def write_random_llama(directory: Path, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """A LLaMA of these sizes (the names are those of its configuration) with random weights; those of its blocks are 2:4."""
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                keep(weight, Pattern(2, 4))
    model.save_pretrained(directory)
    write_word_tokenizer(directory, config.vocab_size)


def check_llama(directory: Path, sizes: Mapping[str, int], dtype: torch.dtype) -> None:
    """Raise MaskLLMError if a directory holds another model than `write_random_llama` writes for these sizes and this dtype."""
    config = LlamaConfig.from_pretrained(directory)
    found = {key: getattr(config, key) for key in [*sizes, "dtype"]}
    different = [f"{key} {found[key]} (wanted {value})" for key, value in (sizes | {"dtype": dtype}).items() if found[key] != value]
    if different:
        raise MaskLLMError(
            f"{directory}: holds another model: {', '.join(different)}; give another --work, or remove all of {directory.parent}"
        )
