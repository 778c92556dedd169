"""Other programs that generate text from quantized weights on a CPU. `benchmarks.rivals` runs this file in their environment.

python rival_programs.py convert PROGRAM BITS DENSE OUTPUT [--llama-cpp SOURCE]
python rival_programs.py measure PROGRAM MODEL PROMPT --new-tokens N --threads N

It imports nothing of this project. `measure` prints one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

WARM_UP_TOKENS = 2
Generate = Callable[[list[int], int], list[float]]
"""Makes so many tokens after a prompt, greedily, and returns the time of each."""


def convert_ctranslate2(dense: Path, output: Path, bits: int, source: Path | None) -> None:
    """CTranslate2 has int8 with one scale a row, for the output layer and the embedding too."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(dense), low_cpu_mem_usage=True).convert(str(output), quantization=f"int{bits}")


def convert_openvino(dense: Path, output: Path, bits: int, source: Path | None) -> None:
    """NNCF's weight-only quantization: int8 a row; int4 in groups of 128 columns, with the output layer and the embedding in int8."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    groups = {"group_size": 128, "ratio": 1.0} if bits == 4 else {}
    config = OVWeightQuantizationConfig(bits=bits, sym=True, **groups)
    OVModelForCausalLM.from_pretrained(dense, export=True, quantization_config=config, compile=False).save_pretrained(output)


def convert_llama_cpp(dense: Path, output: Path, bits: int, source: Path | None) -> None:
    """Q8_0 and Q4_0: scales for 32 columns. With Q4_0 llama.cpp stores the output layer as Q6_K."""
    import llama_cpp

    output.mkdir()
    whole = output / "bf16.gguf"
    script = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(dense), "--outfile", str(whole), "--outtype", "bf16"]
    subprocess.run(script, check=True)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = {8: llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 4: llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[bits]
    settings.nthread = 2
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(output / "model.gguf").encode(), settings):
        raise SystemExit(f"{output}: llama_model_quantize failed")
    whole.unlink()


def ctranslate2_times(model: Path, threads: int) -> tuple[Generate, Path]:
    """How it generates, and the file of weights."""
    import ctranslate2

    generator = ctranslate2.Generator(str(model), device="cpu", inter_threads=1, intra_threads=threads)
    vocabulary = json.loads((model / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompt: list[int], tokens: int) -> list[float]:
        times = []
        generator.generate_batch(
            [[vocabulary[token] for token in prompt]],
            max_length=tokens,
            min_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=lambda step: times.append(time.perf_counter()) and False,
        )
        return times

    return generate, model / "model.bin"


def openvino_times(model: Path, threads: int) -> tuple[Generate, Path]:
    """As `ctranslate2_times`."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    class Clock(openvino_genai.StreamerBase):
        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, tokens: int | list[int]) -> openvino_genai.StreamingStatus:
            self.times += [time.perf_counter()] * (1 if isinstance(tokens, int) else len(tokens))
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def generate(prompt: list[int], tokens: int) -> list[float]:
        settings = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        clock = Clock()
        pipeline.generate(openvino.Tensor(np.array([prompt], dtype=np.int64)), settings, clock)
        return clock.times

    return generate, model / "openvino_model.bin"


def llama_cpp_times(model: Path, threads: int) -> tuple[Generate, Path]:
    """As `ctranslate2_times`."""
    import itertools

    import llama_cpp

    file = model / "model.gguf"
    llama = llama_cpp.Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def generate(prompt: list[int], tokens: int) -> list[float]:
        stream: Iterator[int] = llama.generate(prompt, temp=0.0)
        return [time.perf_counter() for _ in itertools.islice(stream, tokens)]

    return generate, file


PROGRAMS = {
    "ctranslate2": (convert_ctranslate2, ctranslate2_times, ("ctranslate2",)),
    "openvino": (convert_openvino, openvino_times, ("openvino", "openvino-genai", "nncf", "optimum-intel")),
    "llama.cpp": (convert_llama_cpp, llama_cpp_times, ("llama-cpp-python", "gguf")),
}
"""The programs: their conversion, their generation, and the packages whose versions matter."""


def measure(program: str, model: Path, prompt: list[int], new_tokens: int, threads: int) -> dict[str, object]:
    """Generate a few tokens to warm up, then `new_tokens`.

    The warm-up has another prompt, because OpenVINO and llama.cpp reuse what they know of the last one.
    """
    _, times_of, packages = PROGRAMS[program]
    generate, file = times_of(model, threads)
    generate(prompt[::-1], WARM_UP_TOKENS)
    started = time.perf_counter()
    times = generate(prompt, new_tokens)
    if len(times) != new_tokens:
        raise SystemExit(f"{program}: made {len(times)} tokens; wanted {new_tokens}")
    return {
        "first_token_seconds": times[0] - started,
        "tokens_per_second": (len(times) - 1) / (times[-1] - times[0]),
        "file_bytes": file.stat().st_size,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    convert = verbs.add_parser("convert")
    convert.add_argument("program", choices=PROGRAMS)
    convert.add_argument("bits", type=int)
    convert.add_argument("dense", type=Path)
    convert.add_argument("output", type=Path)
    convert.add_argument("--llama-cpp", type=Path)
    measured = verbs.add_parser("measure")
    measured.add_argument("program", choices=PROGRAMS)
    measured.add_argument("model", type=Path)
    measured.add_argument("prompt", type=Path, help="JSON file with a list of tokens")
    measured.add_argument("--new-tokens", type=int, required=True)
    measured.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    if args.verb == "convert":
        PROGRAMS[args.program][0](args.dense, args.output, args.bits, args.llama_cpp)
    else:
        prompt = json.loads(args.prompt.read_text(encoding="utf-8"))
        print(json.dumps(measure(args.program, args.model, prompt, args.new_tokens, args.threads)))


if __name__ == "__main__":
    main()
