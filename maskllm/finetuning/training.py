"""One training of a run: the arguments of `Trainer`, its checkpoints, and what is shown of it."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from maskllm.distributed import from_first_rank, is_first_rank, wait_for_all
from maskllm.errors import MaskLLMError, whole_message
from maskllm.finetuning.arguments import SparseTrainingArguments
from maskllm.finetuning.settings import RECIPES, FinetuneSettings

COMPLETE = "complete"
"""An empty file in a checkpoint that all processes have written to its end."""


def training_arguments(settings: FinetuneSettings, folder: Path) -> SparseTrainingArguments:
    """The arguments of a training that writes its checkpoints into `folder`. Making them joins the processes of the job.

    Raises MaskLLMError if transformers refuses them.
    """
    names = (
        "ce_loss_coeff", "kl_loss_coeff", "kl_temperature", "squarehead_loss_coeff", "learning_rate", "weights_learning_rate",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "num_train_epochs", "per_device_train_batch_size", "bf16",
        "dataloader_num_workers", "weight_reg", "seed", "logging_steps", "save_steps",
    )  # fmt: skip
    options = dict(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.max_steps or -1,
        gumbel_temperature_range=list(settings.gumbel_temperature_range),
        gumbel_scale_range=list(settings.gumbel_scale_range),
        gradient_accumulation_steps=settings.gradient_accumulation_steps or 1,
        save_total_limit=2,  # while the newest is being written, the one before it is the complete one
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=not torch.cuda.is_available(),
        ddp_timeout=7200,
        **({"gradient_checkpointing": True} if settings.gradient_checkpointing else {}),  # even False warns: it is to be renamed
        **{name: getattr(settings, name) for name in names},
    )
    try:
        arguments = SparseTrainingArguments(**options)
    except ValueError as error:  # such as bf16 on a GPU without it
        raise MaskLLMError(f"transformers refuses the training's arguments: {whole_message(error)}") from error
    if settings.gradient_accumulation_steps is None:
        at_once = settings.per_device_train_batch_size * arguments.world_size
        arguments.gradient_accumulation_steps = max(1, round(RECIPES[settings.task].batch / at_once))
    return arguments


@contextlib.contextmanager
def errors_of_workers() -> Iterator[None]:
    """A block in which an error of a process that prepares examples has its own message alone; torch adds the process's traceback."""
    try:
        yield
    except MaskLLMError as error:
        text = str(error)
        if not text.startswith("Caught MaskLLMError in DataLoader worker"):
            raise
        raise MaskLLMError(text.splitlines()[-1].partition("MaskLLMError: ")[2]) from None


def newest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint of the training in `folder`; those that are not complete are removed."""
    found = None
    if is_first_rank():
        for path in (folder / "checkpoints").glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if not (path / COMPLETE).exists():
                shutil.rmtree(path)
            elif found is None or _step(path) > _step(found):
                found = path
    return from_first_rank(found and str(found))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class Watch(TrainerCallback):
    """Marks each checkpoint that all processes have written, stops a training that diverges, and tells of one that is all warm-up."""

    def __init__(self, note: Callable[[], None]) -> None:
        self._note = note

    def on_train_begin(self, args: SparseTrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if args.warmup_steps >= state.max_steps and is_first_rank():
            found = f"--warmup-steps {args.warmup_steps:g} of {state.max_steps} steps"
            print(f"warning: {found}: the learning rate never reaches --learning-rate", file=sys.stderr)

    def on_save(self, args: SparseTrainingArguments, state: Any, control: Any, **_: Any) -> None:
        wait_for_all()
        if is_first_rank():
            (Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / COMPLETE).touch()
            self._note()

    def on_log(self, args: SparseTrainingArguments, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        # Trainer leaves losses that are not finite out of the mean that it logs.
        if not all(math.isfinite(logs.get(name, 0)) for name in ("grad_norm", "weights_grad_norm")):
            raise MaskLLMError(
                f"step {state.global_step}: the gradient is not a number; start again with a smaller --learning-rate in another --output"
            )


class Progress(ProgressCallback):
    """`Trainer`'s bar with the last line of the log beside it; without a terminal each line of the log. All on standard error.

    transformers' own callbacks print the lines as dictionaries to standard output, which has the table of the results.
    """

    def on_train_begin(self, args: SparseTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: SparseTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.disable_tqdm:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: SparseTrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.disable_tqdm:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: SparseTrainingArguments, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs or not state.is_world_process_zero:
            return
        values = ", ".join(f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch")
        if args.disable_tqdm:
            sys.stderr.write(
                f"step {state.global_step} of {state.max_steps}: {values}\n"
            )  # at once, so that an interrupt does not tear it
            sys.stderr.flush()
        else:
            self.training_bar.set_postfix_str(values)
