"""Text generation from a compressed model beside other programs that quantize: CTranslate2, OpenVINO and llama.cpp, on a CPU.

    python -m benchmarks.rivals --work DIR [--programs NAME...] [--python PYTHON] [--llama-cpp SOURCE] [--json FILE]

The model has the shape of TinyLlama 1.1B, random weights, and 2:4 zeros (the two smallest of every four weights of a block's linears). Each
program gets the same weights and the same 128 random tokens, and generates 64 more, one text at a time: each in turn, each in a
process of its own, several rounds. Models are kept in DIR, and are not made again.

The other programs have an environment of their own:

    python -m venv outputs/rivals && cd outputs/rivals
    bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    bin/pip install ctranslate2 openvino openvino-genai nncf "transformers<5.6" sentencepiece protobuf accelerate "requests>=2.33"
    bin/pip install --no-deps optimum optimum-intel gguf       # with dependencies, torchvision would bring torch for CUDA
    bin/pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    mv llama_cpp_python-*/ llama_cpp_python && bin/pip install ./llama_cpp_python

llama.cpp is compiled for the processor at hand, which takes a compiler, CMake and 20 minutes. A program that is not installed is left
out, which is said, and has no row.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2

from benchmarks.models import add_size_options, check_llama, compress, made, sizes_of, write_random_llama
from benchmarks.results import load_average
from maskllm.errors import MaskLLMError
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_json
from maskllm.processes import end_with_parent

OURS = {"dense bf16": None, "2:4 bf16": 16, "2:4 int8": 8, "2:4 int4": 4}
"""What transformers generates from: the bits of `maskllm compress`."""
PROGRAMS = {"ctranslate2": (8,), "openvino": (8, 4), "llama.cpp": (8, 4)}
"""The other programs, and the bits of their weights."""
MODULES = {"ctranslate2": "ctranslate2", "openvino": "openvino", "llama.cpp": "llama_cpp"}
"""The Python module of each program."""
RIVALS = Path(__file__).with_name("rival_programs.py")


def make_model(directory: Path, sizes: dict[str, int]) -> None:
    """Write a LLaMA of random bf16 weights with 2:4 zeros, and tokenizers of as many words as it has tokens."""
    write_random_llama(directory, sizes, torch.bfloat16)
    write_sentencepiece(directory / "tokenizer.model", sizes["vocab_size"])


def write_sentencepiece(file: Path, size: int) -> None:
    """A SentencePiece tokenizer of `size` words, which the converter of llama.cpp wants."""
    model = sentencepiece_model_pb2.ModelProto()
    kinds = model.SentencePiece
    words = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    words += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    words += [(f"word{number}", kinds.NORMAL) for number in range(len(words), size)]
    for rank, (word, kind) in enumerate(words[:size]):
        model.pieces.add(piece=word, score=-rank, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = size
    file.write_bytes(model.SerializeToString())


def run(words: Sequence[object]) -> str:
    """Run a program and return what it prints. Raises MaskLLMError with the end of its messages if it fails."""
    ends = functools.partial(end_with_parent, os.getpid(), signal.SIGTERM)
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, preexec_fn=ends)
    if done.returncode:
        raise MaskLLMError(f"{' '.join(map(str, words))}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def prepare(args: argparse.Namespace) -> dict[str, list[object]]:
    """Make all models. Returns the command that measures each one, by name."""
    sizes = sizes_of(args)
    args.work.mkdir(parents=True, exist_ok=True)
    dense = made(args.work / "dense", lambda path: make_model(path, sizes))
    check_llama(dense, sizes, torch.bfloat16)
    commands: dict[str, list[object]] = {}
    maskllm = [sys.executable, "-m", "maskllm"]
    ends = [
        "--prompt-tokens",
        args.prompt_tokens,
        "--new-tokens",
        args.new_tokens,
        "--device",
        "cpu",
        "--params-dtype",
        "bf16",
        "--json",
        args.work / "ours.json",
    ]
    for name in args.ours:
        model, bits = dense, OURS[name]
        if bits:
            model = made(args.work / f"compressed-{bits}", lambda path, bits=bits: compress(dense, bits, path))
        commands[name] = [*maskllm, "benchmark", "--model", model, *ends]
    prompt = args.work / "prompt.json"
    generator = torch.Generator().manual_seed(0)
    write_json(prompt, torch.randint(args.vocabulary, (args.prompt_tokens,), generator=generator).tolist())
    programs = args.programs if shutil.which(args.python) else []
    if args.programs and not programs:
        print(f"{', '.join(args.programs)}: left out; there is no interpreter {args.python}", flush=True)
    for program in programs:
        finds = f"import importlib.util, sys; sys.exit(not importlib.util.find_spec({MODULES[program]!r}))"
        if subprocess.run([args.python, "-c", finds], check=False).returncode:
            print(f"{program}: left out; {args.python} has no module {MODULES[program]}", flush=True)
            continue
        for bits in PROGRAMS[program]:
            source = ["--llama-cpp", args.llama_cpp] if program == "llama.cpp" else []
            convert = [args.python, RIVALS, "convert", program, bits, dense]
            model = made(
                args.work / f"{program}-{bits}", lambda path, convert=convert, source=source: run([*convert, path, *source])
            )
            measure = [args.python, RIVALS, "measure", program, model, prompt, "--new-tokens", args.new_tokens]
            commands[f"{program} int{bits}"] = [*measure, "--threads", torch.get_num_threads()]
    return commands


def measured(command: Sequence[object], work: Path) -> dict[str, Any]:
    """The numbers of one run, with the load before it."""
    load = round(load_average(), 1)
    output = run(command)
    numbers = read_json_object(work / "ours.json")["results"][0] if "maskllm" in command else json.loads(output.splitlines()[-1])
    wanted = ("first_token_seconds", "tokens_per_second", "file_bytes", "versions")
    return {key: numbers[key] for key in wanted if key in numbers} | {"load": load}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the models, measure them, and print each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="where the models are kept")
    parser.add_argument("--ours", nargs="*", choices=list(OURS), default=list(OURS), help="what transformers runs; default: all")
    parser.add_argument("--programs", nargs="*", choices=list(PROGRAMS), default=list(PROGRAMS), help="default: all")
    parser.add_argument("--python", default="outputs/rivals/bin/python", help="the interpreter that has the other programs")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        default=Path("outputs/rivals/llama_cpp_python/vendor/llama.cpp"),
        metavar="SOURCE",
        help="the source of llama.cpp, which has its converter",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="times that each model is measured; default: %(default)s"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
    add_size_options(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    commands = prepare(args)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            numbers = measured(command, args.work)
            rows[name].append(numbers)
            print(
                f"{name:18} first token {numbers['first_token_seconds']:7.3f} s, {numbers['tokens_per_second']:6.2f} tokens/s, "
                f"{numbers['file_bytes'] / 1e6:7.1f} MB, load {numbers['load']}",
                flush=True,
            )
    if args.json:
        settings = {key: getattr(args, key) for key in ("prompt_tokens", "new_tokens", "hidden", "mlp", "layers", "vocabulary")}
        write_json(args.json, {"settings": settings | {"threads": torch.get_num_threads()}, "rows": rows})


if __name__ == "__main__":
    sys.exit(run_guarded("rivals", main))
