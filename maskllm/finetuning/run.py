"""A run of `maskllm finetune`: measure the dense model, prune, measure, train, measure, report.

In the output directory each finished stage has left a file, which appears complete or not at all, so the same command goes on from the
last one, and from the training's last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import disable_fsdp_ram_efficient_loading
from torch import distributed as dist
from torch.utils.data import Subset
from transformers import PreTrainedModel
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, PrinterCallback

from maskllm.distributed import from_first_rank, is_first_rank, rank_and_size, wait_for_all
from maskllm.errors import MaskLLMError
from maskllm.evaluation.huggingface import block_weights, hash_of, zero_share
from maskllm.files import atomic_directory, read_json_object, write_json, write_text
from maskllm.finetuning.record import RunRecord
from maskllm.finetuning.report import DENSE, ONE_SHOT, TRAINED, Result, build_report, results_table, write_report
from maskllm.finetuning.settings import DECIDE_NOTHING, FinetuneSettings
from maskllm.finetuning.speech import SpeechTask
from maskllm.finetuning.task import Example, Task
from maskllm.finetuning.text import TextTask
from maskllm.finetuning.trainer import SparseTrainer, check_engine
from maskllm.finetuning.training import Progress, Watch, errors_of_workers, newest_checkpoint, training_arguments
from maskllm.finetuning.translation import TranslationTask
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.loading import load_hf_model, quiet_transformers
from maskllm.huggingface.mask_file import open_mask_file, write_mask_file
from maskllm.huggingface.side_files import read_side_files, write_side_files
from maskllm.huggingface.sparse_model import given_masks, linears_to_mask, sparsify
from maskllm.huggingface.weights_hash import TRAINED as TRAINED_WEIGHTS
from maskllm.huggingface.weights_hash import StatedHash, read_hash, weights_sha256, write_hash
from maskllm.masking.selection import Sparsity
from maskllm.patterns import Pattern
from maskllm.pruning.huggingface import prune_hf
from maskllm.pruning.solve import PruneSettings
from maskllm.reporting.files import only_finite

TASKS: dict[str, type[Task]] = {task.name: task for task in (TextTask, TranslationTask, SpeechTask)}
HELD_OUT = 0.05
"""The share of the examples to measure on if there is no file for that."""
AT_ONCE = "prune one-shot"
"""The stage that prunes to the last sparsity of a schedule at once, for comparison."""


def finetune(settings: FinetuneSettings) -> dict[str, Any]:
    """Make a model sparse, train it and write model, mask file and report into `settings.output`; returns the report.

    It runs alone, or in every process that torchrun or `accelerate launch` starts. Raises MaskLLMError before any work if a setting, a
    file or the model cannot be used; of a recording only the head is read before.
    """
    settings = settings.complete()
    source = find_source(settings.model)
    task = TASKS[settings.task](source, settings)
    examples, held_out = _read_data(task, settings)
    try:
        with quiet_transformers():
            run = _Run(settings, source, task, examples, held_out)
            with run.record:
                return run.report()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _read_data(task: Task, settings: FinetuneSettings) -> tuple[Sequence[Example], Sequence[Example]]:
    """The examples to train on and to measure on."""
    examples = task.read(settings.data, for_training=True)
    if settings.eval_data:
        held_out = task.read(settings.eval_data, for_training=False)
    else:
        kept = len(examples) - max(1, round(HELD_OUT * len(examples)))
        if not kept:
            raise MaskLLMError(f"{settings.data[0]}: has one example, and none is left to measure on; give --eval-data")
        examples, held_out = Subset(examples, range(kept)), Subset(examples, range(kept, len(examples)))
    if settings.eval_samples is not None:
        held_out = Subset(held_out, range(min(settings.eval_samples, len(held_out))))
    return examples, held_out


class _Run:
    def __init__(
        self, settings: FinetuneSettings, source: Path, task: Task, examples: Sequence[Example], held_out: Sequence[Example]
    ) -> None:
        self.settings, self.source, self.task, self.examples, self.held_out = settings, source, task, examples, held_out
        self.output = Path(settings.output)
        arguments = training_arguments(settings, self.output)
        self.device = arguments.device  # joins the other processes
        # accelerate's default for FSDP: only the first process reads weights. But all of them measure and prune with the whole model.
        disable_fsdp_ram_efficient_loading()
        check_engine(arguments, Accelerator().state)
        self._accumulation = arguments.gradient_accumulation_steps
        self.record = RunRecord(self.output, lambda: _compared(settings), self.device)
        if not _exists(self.output / "model"):
            self._check_models()
        torch.manual_seed(settings.seed)

    def report(self) -> dict[str, Any]:
        """Run all stages that have not finished, and write the report."""
        settings = self.settings
        dense = Result(DENSE, self._measured("dense", lambda: self._load(self.source)), [])
        results = [dense]
        steps = len(settings.targets) or 1
        if steps > 1:
            pruned = functools.partial(self._pruned_at_once, settings.targets[-1])
            if _exists(self._evaluation_file("one-shot")):
                self._say_done(AT_ONCE)
            results.append(Result(ONE_SHOT, self._measured("one-shot", pruned), [AT_ONCE]))
        start, made = self.source, []
        for number, target in enumerate(settings.targets or [None], start=1):
            last = number == steps
            name = TRAINED if last else f"{TRAINED}, {_words(target)}"
            folder = self.output if last else self.output / f"rung-{number}"
            made = [*made, *self._stages_of(target)]
            self._make(folder, target, start, is_first=number == 1)
            if steps == 1 and target is not None:
                results.append(Result(ONE_SHOT, self._evaluation("one-shot"), [f"prune {_words(target)}"]))
            trained = functools.partial(self._load, folder / "model")
            results.append(Result(name, self._measured(name, trained, "trained" if last else folder.name), made))
            start = folder / "model"
        report = build_report(
            settings,
            self.task,
            results,
            self.record,
            logs=[
                json.loads(line)
                for folder in [*(self.output / f"rung-{number}" for number in range(1, steps)), self.output]
                for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
            ],
            counts={"training_examples": len(self.examples), "examples": dense.evaluation["examples"]},
            training={
                "gradient_accumulation_steps": self._accumulation,
                "processes": rank_and_size()[1],
                "device": str(self.device),
            },
            weights_sha256=None if (stated := read_hash(start)) is None else stated.weights_sha256,
        )
        if is_first_rank():
            write_report(report, self.output)
            print(results_table(report))
            written = ["model", *(["mask.npz"] if settings.targets else []), "report.html"]
            print(f"wrote {', '.join(str(self.output / name) for name in written)}")
        return report

    def _stages_of(self, target: Sparsity | None) -> list[str]:
        return [f"prune {_words(target)}", f"train {_words(target)}"] if target is not None else ["train"]

    def _check_models(self) -> None:
        """Raise MaskLLMError if the model cannot be pruned so, if the mask file does not fit, or if the teacher has another shape."""
        mask = open_mask_file(self.settings.mask) if self.settings.mask else None
        ours = self._load(self.source)
        for target in self.settings.targets or [None]:
            pattern = target if isinstance(target, Pattern) else None
            linears = linears_to_mask(ours, pattern, train=self.settings.train)
            if mask is not None:
                _check_share(mask.path, zero_share(given_masks(mask, linears, pattern)), target)
        if self.settings.teacher is None:
            return
        ours = {name: list(weight.shape) for name, weight in ours.named_parameters()}
        theirs = {name: list(weight.shape) for name, weight in self._load(find_source(self.settings.teacher)).named_parameters()}
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                found, wanted = (shapes.get(name, "missing") for shapes in (theirs, ours))
                raise MaskLLMError(
                    f"--teacher {self.settings.teacher}: {name} is {found}, that of --model is {wanted}; wanted a model of the same shape"
                )

    def _load(self, directory: Path) -> PreTrainedModel:
        return load_hf_model(directory, dtype=torch.float32, device=self.device, model_class=self.task.model_class)

    def _measured(self, name: str, model: Callable[[], PreTrainedModel], file: str | None = None) -> dict[str, Any]:
        """The contents of evaluation/FILE.json, which is written first if it is missing. `model` is called for that only.

        `name` is the model's in the table, and the file's too if that has no other.
        """
        file = file or name
        if _exists(self._evaluation_file(file)):
            self._say_done(f"measure {name}")
        else:
            self._measure(name, file, model())
        return self._evaluation(file)

    def _measure(self, name: str, file: str, model: PreTrainedModel) -> None:
        with self.record.stage(f"measure {name}"):
            found = self.task.measure(model.eval(), self.held_out, self._autocast)
        if is_first_rank():
            values = {"measures": found.measures, "examples": found.examples, "zeros": zero_share(block_weights(model))}
            values["outputs"] = found.outputs
            write_json(self._evaluation_file(file), only_finite(values))
        wait_for_all()

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def _evaluation_file(self, file: str) -> Path:
        return self.output / "evaluation" / f"{file}.json"

    def _evaluation(self, file: str) -> dict[str, Any]:
        return read_json_object(self._evaluation_file(file))

    def _make(self, folder: Path, target: Sparsity | None, start: Path, *, is_first: bool) -> None:
        """Prune the model at `start` to `target`, None for not at all, train it and write it to `folder`, all if it is not there yet."""
        if _exists(folder / "model"):
            pruned, *trained = self._stages_of(target)
            self._say_done(pruned, *(["measure one-shot"] if len(self.settings.targets) == 1 else []), *trained)
        else:
            self._prune_and_train(folder, target, start, is_first=is_first)
        if is_first_rank():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _say_done(self, *stages: str) -> None:
        """Tell of stages that an earlier start of the run has finished; those that the run does not have are left out."""
        if is_first_rank():
            lines = [f"[{stage}] done before\n" for stage in stages if stage in self.record.stages]
            print("".join(lines), end="", file=sys.stderr, flush=True)

    def _prune_and_train(self, folder: Path, target: Sparsity | None, start: Path, *, is_first: bool) -> None:
        if target is None:
            self._train(folder, self._load(start), None, None)
            return
        mask, model = self._pruned(folder, target, start, zeros_stay=not is_first)
        if len(self.settings.targets) == 1:
            self._measured("one-shot", lambda: model)
        if self.settings.train != "weights":
            model = self._load(start)
        self._train(folder, model, target, mask)

    def _pruned(self, folder: Path, target: Sparsity, start: Path, *, zeros_stay: bool) -> tuple[str | Path, PreTrainedModel]:
        """The mask file of the model at `start` pruned to `target`, and that model, with zeros."""
        model = self._load(start)
        mask = self.settings.mask or folder / "pruned.npz"
        # Updated weights are in the training's checkpoints.
        if self.settings.mask or (_exists(mask) and (not self.settings.update_weights or newest_checkpoint(folder))):
            self._say_done(f"prune {_words(target)}")
            open_mask_file(mask).apply(block_weights(model))
            return mask, model
        masks = self._prune(f"prune {_words(target)}", model, target, zeros_stay=zeros_stay)
        if is_first_rank():
            write_mask_file(mask, masks.items())
        wait_for_all()
        return mask, model

    def _pruned_at_once(self, target: Sparsity) -> PreTrainedModel:
        model = self._load(self.source)
        self._prune(AT_ONCE, model, target, zeros_stay=False)
        return model

    def _prune(self, stage: str, model: PreTrainedModel, target: Sparsity, *, zeros_stay: bool) -> dict[str, torch.Tensor]:
        """Prune in place; returns the masks. All processes get the first one's weights."""
        settings = self.settings
        order = list(range(len(self.examples)))
        random.Random(settings.seed).shuffle(order)
        batches = [self.task.collate([self.examples[place]]) for place in order[: settings.calibration_samples]]
        with self.record.stage(stage):
            found = prune_hf(model, batches, PruneSettings(settings.method, target, settings.update_weights, zeros_stay=zeros_stay))
            if dist.is_initialized():
                for weight in block_weights(model).values():
                    dist.broadcast(weight, 0)
        return found.unpacked(model)

    def _train(self, folder: Path, model: PreTrainedModel, target: Sparsity | None, mask: str | Path | None) -> None:
        """Train and write the model, the mask file and the log into `folder`."""
        settings = self.settings
        teacher = None
        if settings.distills and (settings.train != "masks" or settings.teacher):
            teacher = self._load(find_source(settings.teacher) if settings.teacher else self.source)
        pattern = target if isinstance(target, Pattern) else None
        if target is None:  # the dense model: masks that remove nothing
            masks: Any = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in block_weights(model).items()}
        else:
            masks = open_mask_file(mask)
        use_cache = getattr(model.config, "use_cache", None)
        with self.record.stage("train" if target is None else f"train {_words(target)}") as note:
            sparsify(model, pattern, train=settings.train, masks=masks, prior_strength=settings.prior_strength, seed=settings.seed)
            trainer = SparseTrainer(
                model,
                training_arguments(settings, folder),
                train_dataset=self.examples,
                data_collator=self.task.collate,
                teacher=teacher,
                callbacks=[Watch(note)],
            )
            trainer.remove_callback(PrinterCallback if trainer.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK)
            trainer.add_callback(Progress)
            checkpoint = newest_checkpoint(folder)
            if checkpoint is not None and is_first_rank():
                print(f"goes on from {Path(checkpoint).name}", file=sys.stderr)
            with errors_of_workers():
                trainer.train(resume_from_checkpoint=checkpoint)
            log = trainer.state.log_history
            model, masks = trainer.finish()
        if use_cache is not None:
            model.config.use_cache = use_cache  # Trainer switches it off
        if is_first_rank():
            write_text(folder / "log.jsonl", "".join(f"{json.dumps(line)}\n" for line in log))
            if target is not None:
                write_mask_file(folder / "mask.npz", masks.items())
            self._save(folder / "model", model)
        wait_for_all()
        del trainer, teacher
        gc.collect()

    def _save(self, directory: Path, model: PreTrainedModel) -> None:
        """Write the model in the dtype of the original, with the original's other files and the hash of its weights."""
        dtype = getattr(self.task.config, "dtype", None)
        if isinstance(dtype, torch.dtype):
            model = model.to(dtype)
        files = read_side_files(self.source)
        with atomic_directory(directory) as temporary:
            write_side_files(files, temporary)
            model.save_pretrained(temporary)
            kept = None if self.settings.train == "masks" else TRAINED_WEIGHTS
            write_hash(temporary, StatedHash(weights_sha256(temporary), kept))


def _compared(settings: FinetuneSettings) -> dict[str, Any]:
    """The settings that decide the results, with what tells their files from others: the data's sizes, what models and masks hold."""
    values = {name: value for name, value in asdict(settings).items() if name not in ("output", *DECIDE_NOTHING)}
    for name in ("data", "eval_data"):
        values[name] = [[str(Path(file).resolve()), f"{Path(file).stat().st_size} bytes"] for file in getattr(settings, name)]
    for name in ("model", "teacher"):
        if (model := getattr(settings, name)) is not None:
            values[name] = [[model, f"weights {hash_of(find_source(model))}"]]
    if settings.mask is not None:
        values["mask"] = [[settings.mask, f"masks {open_mask_file(settings.mask).digest}"]]
    return values


def _words(target: Sparsity | None) -> str:
    """2:4, or 75 %."""
    return str(target) if isinstance(target, Pattern) else f"{100 * target:g} %"


def _check_share(mask: Path, removed: float, target: Sparsity) -> None:
    """Raise MaskLLMError if a given mask file does not remove the share of the weights that is wanted."""
    wanted = target.sparsity if isinstance(target, Pattern) else target
    if abs(removed - wanted) > 0.005:
        raise MaskLLMError(f"{mask}: removes {100 * removed:.1f} % of the weights, wanted {_words(target)}")


def _exists(path: Path) -> bool:
    """Whether the first process sees a path; the processes agree on that."""
    return from_first_rank(path.exists())
