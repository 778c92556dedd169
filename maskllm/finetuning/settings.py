"""The settings of `maskllm finetune`: one dataclass with the defaults. `maskllm.cli.finetune` makes the command line from it.

An option that means what a field of transformers' `TrainingArguments` means has its name. A default that depends on the task is that of
the sparse fine-tuning paper for this task (arXiv 2310.06927, section 4): MPT-7B on GSM8K, T5-small on WMT14 and Whisper-small on
CommonVoice. With `train` masks or both it is that of MaskLLM (arXiv 2409.17481, appendix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from maskllm.errors import MaskLLMError, flag
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.masking.selection import Sparsity
from maskllm.patterns import Pattern
from maskllm.pruning.solve import METHODS

DECIDE_NOTHING = ("per_device_eval_batch_size", "dataloader_num_workers", "logging_steps", "save_steps")
"""Settings that may change while a run goes on, because they do not decide its results."""


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass(frozen=True)
class Recipe:
    """What was published for a task. `batch` counts examples in a step, on all processes."""

    learning_rate: float
    num_train_epochs: float
    batch: int
    max_length: int
    warmup_steps: int
    ce_loss_coeff: float
    squarehead_loss_coeff: float


RECIPES = {
    "text": Recipe(1e-4, 4, 32, 512, 20, 1.0, 1.0),
    "translation": Recipe(2e-3, 3, 128, 128, 0, 1.0, 1.0),
    "speech": Recipe(2e-4, 6, 32, 225, 0, 0.5, 1.0),
}
LOGITS_LEARNING_RATE = 5e-5
"""The learning rate of the logits in the recipe of MaskLLM, which has 2000 steps."""


@dataclass(frozen=True)
class FinetuneSettings:
    """All settings of a run. `complete` fills in those that depend on others."""

    model: str = _option("", "Hugging Face model to make sparse: directory or hub id", metavar="DIR_OR_ID")
    task: str = _option("", "what the model does, and how it is measured: perplexity, BLEU, word error rate", choices=list(RECIPES))
    data: tuple[str, ...] = _option(
        (),
        "what to train on. text: files of JSON lines with `text`, or with `prompt` and `completion` (only the completion counts), or of "
        "plain text; translation: two files, source and target, whose lines are pairs; speech: JSON lines with `audio`, a wav or flac "
        "file, and `text`",
        nargs="+",
        metavar="FILE",
    )
    eval_data: tuple[str, ...] = _option(
        (),
        "what to measure on, as --data; default: the last 5 %% of --data, which is then not trained on",
        nargs="+",
        metavar="FILE",
    )
    output: str = _option("", "directory for the model, the mask file and the report", metavar="DIR")

    pattern: str | None = _option(None, "keep N of every M consecutive weights", metavar="N:M")
    sparsity: float | None = _option(
        None, "remove this share of the weights, in any places; 0: train the dense model, for comparison", metavar="SHARE"
    )
    sparsity_schedule: tuple[float, ...] = _option(
        (),
        "remove these rising shares one after the other: each is pruned from the one before it, and trained",
        type=float,
        nargs="+",
        metavar="SHARE",
    )
    method: str = _option("sparsegpt", "how to choose the mask that the training starts from", choices=METHODS)
    update_weights: bool = _option(False, "with --train weights: start from SparseGPT's updated weights")
    mask: str | None = _option(
        None, "mask file, or the hub id of a repository that holds one, to start from instead of pruning", metavar="F.npz_OR_ID"
    )
    calibration_samples: int = _option(128, "training examples for Wanda and SparseGPT", metavar="K")
    train: str = _option(
        "weights",
        "what is trained: the weights that the mask keeps, the masks, with frozen weights, or both",
        choices=("weights", "masks", "both"),
    )

    teacher: str | None = _option(
        None,
        "model of the same shape that the KL and SquareHead terms compare with; default: --model as it was before pruning",
        metavar="DIR_OR_ID",
    )
    ce_loss_coeff: float | None = _option(
        None, "weight of the cross-entropy with the labels; default: 1, with --task speech and --train weights 0.5"
    )
    kl_loss_coeff: float = _option(0.0, "weight of the divergence from the teacher's predictions, T^2 * KL(teacher || student)")
    kl_temperature: float = _option(1.0, "temperature T of both predictions in that divergence")
    squarehead_loss_coeff: float | None = _option(
        None,
        "weight of SquareHead, the relative squared error of the hidden states after each block; default: 1 with --train weights, else 0",
    )

    learning_rate: float | None = _option(
        None,
        "highest learning rate of what is trained, with --train both of the logits; default: text 1e-4, translation 2e-3, speech 2e-4, "
        "with --train masks and both 5e-5",
    )
    weights_learning_rate: float | None = _option(
        None, "with --train both: highest learning rate of the weights; default: text 1e-4, translation 2e-3, speech 2e-4"
    )
    lr_scheduler_type: str = _option(
        "linear", "how the learning rate falls after --warmup-steps", choices=["linear", "cosine", "constant_with_warmup"]
    )
    warmup_steps: int | None = _option(None, "steps in which the learning rate rises; default: text 20, else 0")
    weight_decay: float = _option(0.0, "decoupled weight decay; with --train both of the logits, and none of the weights")
    max_grad_norm: float = _option(1.0, "clip the gradient to this norm, with --train both those of logits and weights apart")
    num_train_epochs: float | None = _option(
        None, "passes over --data, for each share of a schedule; default: text 4, translation 3, speech 6"
    )
    max_steps: int | None = _option(None, "steps, instead of --num-train-epochs")
    per_device_train_batch_size: int = _option(8, "examples that a device holds at once")
    per_device_eval_batch_size: int = _option(8, "the same while measuring")
    gradient_accumulation_steps: int | None = _option(
        None,
        "batches of all devices in a step; default: as many as give 32 examples (text, speech) or 128 (translation)",
    )
    max_length: int | None = _option(
        None,
        "tokens in an example: text 512 by default, longer ones are cut; translation 128, source and target each; speech 225, the text",
    )
    bf16: bool = _option(False, "compute in bf16; the weights that are trained stay in fp32")
    gradient_checkpointing: bool = _option(False, "save memory: compute activations a second time in the backward pass")
    dataloader_num_workers: int = _option(0, "processes that prepare examples")
    gumbel_temperature_range: tuple[float, float] = _option(
        AnnealingSchedule.temperature_range, "with --train masks or both: softmax temperature, first and last", type=float, nargs=2
    )
    gumbel_scale_range: tuple[float, float] = _option(
        AnnealingSchedule.scale_range, "with --train masks or both: multiplier of the logits, first and last", type=float, nargs=2
    )
    prior_strength: float = _option(3.0, "with --train masks or both: how far the first mask moves the initial logits")
    weight_reg: float = _option(
        AnnealingSchedule.weight_reg, "with --train masks or both: weight of the sparse weight regularization"
    )
    seed: int = _option(1234, "seed of the order of the examples, of the calibration samples and of the masks")
    logging_steps: float = _option(0.02, "steps between lines of the log; below 1: a share of all steps")
    save_steps: float = _option(0.1, "steps between checkpoints, from which a killed run goes on; below 1: a share of all steps")

    eval_samples: int | None = _option(None, "measure on the first examples of --eval-data only", metavar="N")
    num_beams: int = _option(1, "translation, speech: beams of the search that writes the text; 1: greedy")
    source_prefix: str = _option("", "translation: words before each source line, such as 'translate English to German: '")
    language: str | None = _option(
        None, "speech: the language of the recordings, such as hindi; a multilingual Whisper needs it, and others do not take it"
    )
    normalizer: str | None = _option(
        None,
        "speech: how both texts are made alike before errors are counted. english, basic: Whisper's; digits: only the digits and the words "
        "zero to nine, each as a word; default: english, with another --language basic",
        choices=["english", "basic", "digits"],
    )

    @property
    def is_dense(self) -> bool:
        """Whether the dense model is trained, for comparison."""
        return self.sparsity == 0

    @property
    def targets(self) -> list[Sparsity]:
        """The sparsities that are reached one after the other; empty for the dense model."""
        if self.pattern is not None:
            return [Pattern.parse(self.pattern)]
        return [] if self.is_dense else list(self.sparsity_schedule) or [self.sparsity]

    @property
    def distills(self) -> bool:
        """Whether the loss has a term that needs a teacher. The settings are complete."""
        return self.kl_loss_coeff > 0 or self.squarehead_loss_coeff > 0

    def complete(self) -> FinetuneSettings:
        """The settings without None where a default depends on the task and on what is trained, and with --train checked.

        `gradient_accumulation_steps` stays as it is: its default depends on the number of processes. Raises MaskLLMError if values do
        not go together or are out of range.
        """
        self._check()
        recipe, learns = RECIPES[self.task], self.train != "weights"
        defaults = {
            "ce_loss_coeff": 1.0 if learns or self.is_dense else recipe.ce_loss_coeff,
            "squarehead_loss_coeff": 0.0 if learns or self.is_dense else recipe.squarehead_loss_coeff,
            "learning_rate": LOGITS_LEARNING_RATE if learns else recipe.learning_rate,
            "weights_learning_rate": recipe.learning_rate,
            "warmup_steps": 0 if learns else recipe.warmup_steps,
            "num_train_epochs": recipe.num_train_epochs,
            "max_length": recipe.max_length,
        }
        if self.task == "speech":
            defaults["normalizer"] = "english" if self.language in (None, "english", "en") else "basic"
        complete = replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})
        if self.teacher is not None and not complete.distills:
            raise MaskLLMError("--teacher: no term of the loss uses it; give --kl-loss-coeff or --squarehead-loss-coeff")
        return complete

    def _check(self) -> None:
        given = [name for name in ("pattern", "sparsity", "sparsity_schedule") if getattr(self, name) not in (None, ())]
        if len(given) != 1:
            found = ", ".join(map(flag, given)) or "none"
            raise MaskLLMError(
                f"wanted one of --pattern N:M, --sparsity SHARE and --sparsity-schedule SHARE ..., found {found}; "
                "--sparsity 0 trains the dense model"
            )
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise MaskLLMError(f"--sparsity {self.sparsity}: wanted at least 0 and less than 1")
        if self.sparsity_schedule and not all(
            low < high for low, high in zip((0, *self.sparsity_schedule), (*self.sparsity_schedule, 1), strict=True)
        ):
            shares = " ".join(map(str, self.sparsity_schedule))
            raise MaskLLMError(f"--sparsity-schedule {shares}: wanted rising shares between 0 and 1")
        if self.train != "weights":
            self._check_learns()
        if self.update_weights and self.method != "sparsegpt":
            raise MaskLLMError(f"--update-weights: goes with --method sparsegpt only, found --method {self.method}")
        if self.mask is not None and (self.is_dense or self.sparsity_schedule or self.update_weights):
            raise MaskLLMError("--mask: is the mask itself; leave out --sparsity-schedule, --sparsity 0 and --update-weights")
        if self.is_dense and (self.teacher or self.kl_loss_coeff or self.squarehead_loss_coeff):
            raise MaskLLMError("--sparsity 0: the dense model has no teacher; leave out --teacher and the terms that need one")
        for option, names, holds in (
            ("--train masks or both", _OF_MASKS, self.train != "weights"),
            ("--train both", ("weights_learning_rate",), self.train == "both"),
            ("--kl-loss-coeff", ("kl_temperature",), self.kl_loss_coeff > 0),
            ("--task translation or speech", ("num_beams",), self.task != "text"),
        ):
            for entry in fields(self):
                if entry.name in names and not holds and getattr(self, entry.name) != entry.default:
                    raise MaskLLMError(f"{flag(entry.name)}: goes with {option} only")
        for task, names in (("translation", ("source_prefix",)), ("speech", ("language", "normalizer"))):
            for name in names:
                if self.task != task and getattr(self, name):
                    raise MaskLLMError(f"{flag(name)}: goes with --task {task} only, found --task {self.task}")
        if self.task == "translation":
            for name in ("data", "eval_data"):
                files = getattr(self, name)
                if files and len(files) != 2:
                    raise MaskLLMError(f"{flag(name)}: found {len(files)} files, wanted two, the source and the target lines")
        _check_numbers(self)

    def _check_learns(self) -> None:
        """Raise MaskLLMError if masks cannot be learned so."""
        if self.pattern is None:
            raise MaskLLMError(f"--train {self.train}: masks are learned for a --pattern N:M only; use --train weights")
        Pattern.parse(self.pattern).require_learnable()
        if self.update_weights:
            raise MaskLLMError(f"--update-weights: goes with --train weights only, found --train {self.train}")


_OF_MASKS = ("gumbel_temperature_range", "gumbel_scale_range", "prior_strength", "weight_reg")
"""Settings of mask learning."""
_AT_LEAST_0 = (
    "ce_loss_coeff", "kl_loss_coeff", "squarehead_loss_coeff", "warmup_steps", "weight_decay", "dataloader_num_workers", "seed",
    "prior_strength", "weight_reg", "sparsity",
)  # fmt: skip


def _check_numbers(settings: FinetuneSettings) -> None:
    """Raise MaskLLMError for a number that is not finite, negative, or 0 without meaning something."""
    for entry in fields(settings):
        found = getattr(settings, entry.name)
        for value in found if isinstance(found, tuple) else [found]:
            if isinstance(value, bool | str | None):
                continue
            zero = entry.name in _AT_LEAST_0
            if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
                wanted = "a number of at least 0" if zero else "a positive number"
                raise MaskLLMError(f"{flag(entry.name)} {value}: wanted {wanted}")
    if settings.seed >= 2**32:
        raise MaskLLMError(f"--seed {settings.seed}: wanted less than 2^32")
    if settings.max_length is not None and settings.max_length < 2:
        raise MaskLLMError(f"--max-length {settings.max_length}: wanted at least 2 tokens")
    if settings.kl_loss_coeff == settings.squarehead_loss_coeff == settings.ce_loss_coeff == 0:
        raise MaskLLMError("--ce-loss-coeff 0: nothing is minimized; wanted it, --kl-loss-coeff or --squarehead-loss-coeff above 0")
