"""How fast a Hugging Face model writes text, and how much memory it takes: several models in turn, each in a process of its own."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from maskllm.dtypes import dtype_name
from maskllm.environment.memory import peak_memory_bytes
from maskllm.errors import MaskLLMError, whole_message
from maskllm.huggingface.config import load_config
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.loading import context_of, load_hf_model, quiet_transformers, usable_device
from maskllm.huggingface.tensors import weight_files
from maskllm.markdown import markdown_table
from maskllm.processes import end_with_parent


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is generated, and how."""

    prompt_tokens: int = 128
    """Of each row; they are random. A model of sound hears its window instead, of noise."""
    new_tokens: int = 64
    """That each row gets."""
    rows: int = 1
    """Prompts, or recordings, at once."""
    dtype: torch.dtype | None = None
    """As in `maskllm.huggingface.loading.load_hf_model`."""
    device: str | None = None
    """The default is the GPU if there is one."""


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured of a model."""

    model: str
    first_token_seconds: float
    """From the call of `generate` to the first new token of all rows."""
    tokens_per_second: float
    """New tokens after the first, of all rows together."""
    texts_per_second: float
    """Rows a second, from the call of `generate` to the last token."""
    audio_seconds: float | None
    """Of the recording that each row hears; None for models of text."""
    file_bytes: int
    """Of the files with weights."""
    weight_bytes: int
    """Of parameters and buffers in memory."""
    peak_memory_bytes: int
    """The process's peak resident memory, with Python and torch; on a GPU, the peak of its allocated memory."""
    load_seconds: float
    dtype: str
    device: str
    threads: int
    """torch's threads on a CPU."""


class _Clock(StoppingCriteria):
    """Notes the time at which each token is there. It stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def benchmark(models: Sequence[str | Path], settings: BenchmarkSettings | None = None) -> list[BenchmarkResult]:
    """Measure each model, a directory or a hub id, one after the other.

    Raises MaskLLMError if a model cannot be loaded, if its context is too short, or if its process is killed.
    """
    settings = settings or BenchmarkSettings()
    directories = [find_source(model) for model in models]
    results = []
    for model, directory in zip(models, directories, strict=True):
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent) as pool:
            try:
                results.append(pool.submit(measure, str(model), directory, settings).result())
            except BrokenProcessPool:
                raise MaskLLMError(f"{model}: its process was killed, usually because memory ran out") from None
    return results


def measure(model: str, directory: Path, settings: BenchmarkSettings) -> BenchmarkResult:
    """Load a model and let it generate, once for a few tokens to warm up and once measured. The memory is that of this process.

    Encoder-decoder models of text read the prompt and write the new tokens; those of sound hear noise as long as their window, or 30
    seconds. All others continue the prompt.
    """
    device = usable_device(settings.device)
    started = time.perf_counter()
    model_class = model_class_of(directory)
    loaded = load_hf_model(directory, dtype=settings.dtype, device=device, model_class=model_class)
    load_seconds = time.perf_counter() - started
    _check_length(model, loaded, model_class, settings)
    inputs, audio_seconds = (
        _sound(directory, loaded, settings.rows) if model_class is AutoModelForSpeechSeq2Seq else (_prompt(loaded, settings), None)
    )
    _generate(loaded, inputs, 2)
    started, times = time.perf_counter(), _generate(loaded, inputs, settings.new_tokens)
    on_gpu = device.type == "cuda"
    return BenchmarkResult(
        model=model,
        first_token_seconds=times[0] - started,
        tokens_per_second=settings.rows * (len(times) - 1) / (times[-1] - times[0]),
        texts_per_second=settings.rows / (times[-1] - started),
        audio_seconds=audio_seconds,
        file_bytes=sum((directory / file).stat().st_size for file in weight_files(directory)[0]),
        weight_bytes=sum(tensor.nbytes for tensor in [*loaded.parameters(), *loaded.buffers()]),
        peak_memory_bytes=peak_memory_bytes(device),
        load_seconds=load_seconds,
        dtype=dtype_name(loaded.dtype),
        device=torch.cuda.get_device_name(device) if on_gpu else str(device),
        threads=torch.get_num_threads(),
    )


def model_class_of(directory: Path) -> type:
    """transformers' class of automatic models that loads the model with its head."""
    config = load_config(directory)
    for model_class in (AutoModelForSpeechSeq2Seq, AutoModelForSeq2SeqLM):
        if config.is_encoder_decoder and type(config) in model_class._model_mapping:
            return model_class
    return AutoModelForCausalLM


def _check_length(model: str, loaded: PreTrainedModel, model_class: type, settings: BenchmarkSettings) -> None:
    """Raise MaskLLMError if the model has no places for the tokens."""
    if model_class is AutoModelForSpeechSeq2Seq:
        context = getattr(loaded.config, "max_target_positions", None) or context_of(loaded.config)
        wanted, options = 1 + settings.new_tokens, "--new-tokens and the first one"
    elif model_class is AutoModelForSeq2SeqLM:
        context, wanted, options = (
            context_of(loaded.config),
            max(settings.prompt_tokens, 1 + settings.new_tokens),
            "the longer text",
        )
    else:
        context, wanted = context_of(loaded.config), settings.prompt_tokens + settings.new_tokens
        options = "--prompt-tokens and --new-tokens"
    if context is not None and wanted > context:
        raise MaskLLMError(f"{model}: has a context of {context} tokens; {options} make {wanted}")


def _prompt(model: PreTrainedModel, settings: BenchmarkSettings) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (settings.rows, settings.prompt_tokens), generator=generator).to(model.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _sound(directory: Path, model: PreTrainedModel, rows: int) -> tuple[dict[str, torch.Tensor], float]:
    """The model's inputs for noise, and how many seconds of it. Raises MaskLLMError if the model has no feature extractor."""
    try:
        extractor = AutoFeatureExtractor.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many types
        raise MaskLLMError(f"{directory}: transformers cannot read its feature extractor: {whole_message(error)}") from error
    rate = extractor.sampling_rate
    samples = getattr(extractor, "n_samples", 30 * rate)
    noise = torch.randn(samples, generator=torch.Generator().manual_seed(0)).numpy()
    features = extractor([noise] * rows, sampling_rate=rate, return_tensors="pt")
    inputs = {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None) for name, tensor in features.items()
    }
    return inputs, samples / rate


def _generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], new_tokens: int) -> list[float]:
    """The times at which the new tokens are there. No token ends the text."""
    clock = _Clock(model.device)
    start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    settings = GenerationConfig(do_sample=False, pad_token_id=0, decoder_start_token_id=start)
    model.generation_config = settings
    with quiet_transformers():
        GenerationMixin.generate(  # Whisper's own begins with tokens of its language, and ends at others
            model, **inputs, max_new_tokens=new_tokens, stopping_criteria=StoppingCriteriaList([clock])
        )
    return clock.times


def table(results: Sequence[BenchmarkResult]) -> str:
    """The results as a Markdown table, and how much faster the first model is than each other one."""
    hears = any(result.audio_seconds for result in results)
    header = ["model", "first token, ms", "tokens/s", "texts/s"]
    header += ["seconds a second of audio"] if hears else []
    header += ["weight files, MB", "weights in memory, MB", "peak memory, MB"]
    cells = [
        (
            result.model,
            f"{1e3 * result.first_token_seconds:.1f}",
            f"{result.tokens_per_second:.2f}",
            f"{result.texts_per_second:.3g}",
            *([f"{1 / result.texts_per_second / result.audio_seconds:.3g}" if result.audio_seconds else ""] if hears else []),
            *(f"{size / 1e6:.1f}" for size in (result.file_bytes, result.weight_bytes, result.peak_memory_bytes)),
        )
        for result in results
    ]
    lines = markdown_table(header, cells, left=len(header))
    first, *others = results
    lines += [
        f"{first.model} generates {first.tokens_per_second / other.tokens_per_second:.2f} times as fast as {other.model}, with "
        f"{first.weight_bytes / other.weight_bytes:.2f} of the weights' bytes"
        for other in others
    ]
    return "\n".join(lines)


def check_figure(path: Path) -> None:
    """Raise MaskLLMError if `draw` cannot write this file: matplotlib is missing, or the ending names no format that it has."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise MaskLLMError(f"--figure {path}: needs matplotlib; `pip install matplotlib`") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise MaskLLMError(
            f"--figure {path}: wanted a file that ends with .svg, .png, .pdf or another of {', '.join(sorted(known))}"
        )


def draw(results: Sequence[BenchmarkResult], path: Path) -> None:
    """Draw tokens a second and bytes of weights as bars into the file `path`, which `check_figure` has accepted."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 0.45 * len(results)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = [Path(result.model).name for result in results]
    places = range(len(results))
    for panel, title, values in (
        (panels[0], "tokens a second", [result.tokens_per_second for result in results]),
        (panels[1], "weights in memory, MB", [result.weight_bytes / 1e6 for result in results]),
    ):
        panel.bar_label(panel.barh(places, values, color="#4c72b0"), fmt="%.4g", padding=3)
        panel.set_title(title)
        panel.set_yticks(places, names)
        panel.margins(x=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path)
