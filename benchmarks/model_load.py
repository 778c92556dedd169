"""How long a 2:4 model takes to load, and how much memory: as it is, and as `maskllm compress` stores it.

    python -m benchmarks.model_load --sparse DIR --work DIR [--bits 16 8 4] [--json FILE]
    python -m benchmarks.model_load --random --work DIR       # a LLaMA of 1.1B random weights

Each model is loaded in a process of its own, which has imported everything before, and each page of its weights is touched. The files
are in the system's page cache: reading them into memory, just before in the same process, is what loading is compared with. Peak memory
is the highest resident memory of the load, with the mapped pages of files, less that before it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import maskllm  # noqa: F401 - so that transformers loads compressed weights
from benchmarks.models import TINYLLAMA, compress, made, write_random_llama
from maskllm.failures import run_guarded
from maskllm.files import write_json
from maskllm.huggingface.blocks import block_stacks
from maskllm.huggingface.loading import load_hf_model
from maskllm.huggingface.tensors import weight_files

BUFFER = 1 << 24
PAGE = 4096


def measure(directory: Path) -> dict[str, Any]:
    """The numbers of one model."""
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)  # imports the architecture
    files = [directory / name for name in weight_files(directory)[0]]
    read_files(files)
    read_seconds = min(read_files(files) for _ in range(3))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    started = time.perf_counter()
    model = load_hf_model(directory, dtype=torch.bfloat16, device=torch.device("cpu"))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().view(-1)[:: max(1, PAGE // tensor.element_size())].sum()
    load_seconds, peak = time.perf_counter() - started, _resident("VmHWM")
    ((_, blocks),) = block_stacks(model).items()
    return {
        "file_bytes": sum(file.stat().st_size for file in files),
        "read_seconds": read_seconds,
        "load_seconds": load_seconds,
        "weight_bytes": sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()}),
        "block_bytes": sum(parameter.nbytes for parameter in blocks.parameters()),
        "peak_bytes": peak - before,
    }


def read_files(files: list[Path]) -> float:
    """Seconds to read all bytes of these files into fresh memory, as long as they are."""
    started = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            memory = memoryview(bytearray(os.fstat(opened.fileno()).st_size))
            while memory and (count := opened.readinto(memory[:BUFFER])):
                memory = memory[count:]
    return time.perf_counter() - started


def _resident(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def main(argv: list[str] | None = None) -> None:
    """Compress, measure each model, and print its shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--sparse", type=Path, metavar="DIR", help="2:4 model in bf16")
    which.add_argument("--random", action="store_true", help="a model of the shape of TinyLlama 1.1B, with random weights")
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="folder for compressed models, which are kept")
    parser.add_argument("--bits", nargs="+", type=int, default=[16, 8, 4], help="of the compressed models (default: 16 8 4)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    arguments = parser.parse_args(argv)
    sparse = arguments.sparse or made(arguments.work / "llama", lambda path: write_random_llama(path, TINYLLAMA, torch.bfloat16))
    models = {"dense": sparse}
    for bits in arguments.bits:
        models[str(bits)] = made(arguments.work / f"{sparse.name}-{bits}", lambda path, bits=bits: compress(sparse, bits, path))
    rows = {}
    for name, directory in models.items():
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            rows[name] = row = pool.submit(measure, directory).result()
        print(
            f"{name}: file {row['file_bytes'] / rows['dense']['file_bytes']:.3f} and blocks "
            f"{row['block_bytes'] / rows['dense']['block_bytes']:.3f} of dense; loaded in {row['load_seconds']:.2f} s, "
            f"{row['load_seconds'] / row['read_seconds']:.2f} times reading; "
            f"peak {row['peak_bytes'] / row['weight_bytes']:.2f} of the weights",
            flush=True,
        )
    if arguments.json:
        write_json(arguments.json, rows)


if __name__ == "__main__":
    sys.exit(run_guarded("model_load", main))
