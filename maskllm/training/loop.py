"""The training loop: build everything, then step, log, validate and save until the last step or a reason to stop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from megatron.core import parallel_state
from tqdm import tqdm

from maskllm.checkpoints.removing import remove_leftovers
from maskllm.checkpoints.saving import CheckpointSaver
from maskllm.distributed import device, raised_together
from maskllm.errors import MaskLLMError
from maskllm.masking.sampler import MaskSampler
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.megatron.linears import masked_parameters
from maskllm.training.arguments import TrainArguments
from maskllm.training.cast import Cast
from maskllm.training.data import build_batches
from maskllm.training.data_parallel import data_parallel
from maskllm.training.log import MetricsWriter
from maskllm.training.metrics import TrainMetrics
from maskllm.training.micro_batches import MicroBatches
from maskllm.training.objective import Objective
from maskllm.training.optimizer import build_lr_scheduler, build_optimizer, unchained
from maskllm.training.start import resolve_start
from maskllm.training.state import TrainingState
from maskllm.training.step import Step, StepResult
from maskllm.training.surviving.bad_batch import save_bad_batch
from maskllm.training.surviving.stopping import Stopping
from maskllm.training.trainables import parameter_groups
from maskllm.training.validation import Validation

SAVE_PATIENCE = 6
"""A checkpoint may take this many times `--distributed-timeout-minutes` to write: a file system may be much slower than a network."""


class Trainer:
    """One rank's share of a run: `Trainer(arguments).train()` inside of `maskllm.megatron.process_groups.parallel_processes`."""

    def __init__(
        self,
        arguments: TrainArguments,
        *,
        console: TextIO | None = None,
        progress: Callable[..., None] = lambda *_: None,
    ) -> None:
        """Load the checkpoint, the data and, if a run is resumed, the optimizer's state.

        Args:
            console: where the first rank shows the run's progress; None on other ranks.
            progress: called with what this rank is about to do, and without arguments at each micro-batch, for a watchdog.
        """
        self.arguments = arguments
        self.console = console
        self.progress = progress
        pattern = arguments.check()
        arguments.num_microbatches(parallel_state.get_data_parallel_world_size())  # refuses a batch that does not divide
        if arguments.save and dist.get_rank() == 0:
            remove_leftovers(Path(arguments.save))
        dist.barrier()

        progress("verifying the checkpoint")
        self.start = resolve_start(arguments, pattern, say=self._say)
        self.iteration = self.start.iteration
        """Steps done."""
        before = f"resuming {self.start.checkpoint.path} after iteration {self.iteration} of {arguments.train_iters}"
        self._say(before if self.start.resumed else f"starting from {self.start.checkpoint.path}")

        progress("loading the checkpoint")
        self.sampler = MaskSampler(
            pattern=pattern,
            seed=arguments.seed,
            hard=arguments.hard,
            recompute_masked_weight=arguments.recomputes("masked_weight"),
        )
        self.state = TrainingState.load(self.start, self.sampler)
        masked = masked_parameters(self.state.model)
        groups = parameter_groups(arguments, self.state.model, masked)
        pair = self.state.pair_with_teacher()
        self.model = data_parallel(arguments, self.state.model if pair is None else pair)
        self.optimizer = build_optimizer(arguments, groups, masked, self.model)
        lr_scheduler = build_lr_scheduler(arguments, self.optimizer)
        if self.start.resumed:
            progress("loading the training state")
            self.state.load_optimizer(self.optimizer)
            lr_scheduler.step(self.iteration * arguments.global_batch_size)
        else:
            self.state.start_masters(self.optimizer)

        progress("opening the data")
        train_batches, valid_batches = build_batches(arguments, self.start.model_config.vocab_size, device())
        self.stopping = Stopping(arguments.blend()[0])

        cast = None
        if arguments.uses_cast:
            cast = Cast(arguments, masked, unchained(self.optimizer).optimizer, has_masks=self.start.resumed)
        schedule = AnnealingSchedule(
            arguments.train_iters, arguments.gumbel_temperature_range, arguments.gumbel_scale_range, arguments.weight_reg
        )
        objective = Objective(schedule, self.sampler, arguments.ce_loss_coeff, pair)
        self.micro_batches = MicroBatches(arguments, self.model, objective, progress)
        self.step = Step(
            arguments,
            self.model,
            self.sampler,
            self.micro_batches,
            train_batches,
            groups,
            self.optimizer,
            lr_scheduler,
            self.stopping,
            cast,
        )
        self.validation = None
        if valid_batches is not None:
            self.validation = Validation(
                self.model, self.sampler, masked, self.micro_batches, valid_batches, arguments.eval_iters, self.stopping
            )
        self.metrics = TrainMetrics(arguments, masked, self.micro_batches, cast)
        self.saver = self._build_saver()
        self.bad_steps = 0
        """Skipped steps in a row."""
        self.has_learned = self.start.resumed
        """Whether there has been a good step. Before that, torch's Adam has no state that a checkpoint could hold."""
        self.last_saved = self.iteration if self.start.resumed and self.start.lies_in_save else None
        """The steps in the newest checkpoint of `--save`; None if there is none."""

    def train(self) -> None:
        """Run to the last step, or until SIGTERM, SIGINT or SIGHUP arrives or a dataset file disappears.

        With `--save`, each of these ends leaves a checkpoint of the last good step, and so does a row of steps that are not finite.

        Raises StoppedError after a signal. Raises MaskLLMError if the data are gone, a checkpoint or the metrics cannot be written, no
        step was finite, or `--max-bad-steps` steps in a row were not.
        """
        arguments = self.arguments
        self.stopping.catch_signals()
        with self._progress_bar() as bar, self._writer() as writer:
            window: list[StepResult] = []
            started, paused = time.perf_counter(), 0.0
            while self.iteration < arguments.train_iters:
                self.progress(f"iteration {self.iteration + 1}")
                window.append(self._one_step())
                bar.update()
                if self._is_due(arguments.log_interval):
                    values = self.metrics.of_steps(window, time.perf_counter() - started - paused)
                    if writer is not None:
                        bar.set_postfix({key: f"{values[key]:.3f}" for key in ("loss",) if values[key] is not None})
                        bar.clear()
                        writer.write("train", self.iteration, values)
                    window, started, paused = [], time.perf_counter(), 0.0
                if self.bad_steps == arguments.max_bad_steps:
                    self._end_at_bad_steps()
                pause = time.perf_counter()
                if self.validation is not None and self._is_due(arguments.eval_interval) and not self.stopping.requested:
                    self.progress(f"the validation after iteration {self.iteration}")
                    values = self.validation()
                    if values is None:
                        self._say(f"a signal stopped the validation after iteration {self.iteration}")
                    elif writer is not None:
                        bar.clear()
                        writer.write("validation", self.iteration, values)
                self._save_if_due()
                paused += time.perf_counter() - pause
                if self.stopping.requested:
                    break
            self._finish_saving()
        self._conclude()

    def close(self) -> None:
        """Remove a half-written checkpoint after the training has failed."""
        if self.saver is not None:
            self.saver.abandon()

    def _one_step(self) -> StepResult:
        result = self.step(self.iteration)
        self.iteration += 1
        self.bad_steps = self.bad_steps + 1 if result.skipped else 0
        self.has_learned = self.has_learned or not result.skipped
        return result

    @property
    def _is_last(self) -> bool:
        return self.iteration == self.arguments.train_iters

    def _is_due(self, interval: int | None) -> bool:
        """Whether something that happens every `interval` steps, and after the last one, happens now."""
        return self._is_last or bool(interval and self.iteration % interval == 0)

    def _save_if_due(self) -> None:
        if self.saver is None:
            return
        self.saver.poll()
        # Skipped steps in a row may be repeated once their cause is gone, so they do not count as done, except at the end of the run.
        done = self.iteration if self._is_last else self.iteration - self.bad_steps
        due = self._is_due(self.arguments.save_interval) and done > (self.last_saved or 0)
        if self.has_learned and (due or self.stopping.requested):
            self._save(done)

    def _save(self, iteration: int) -> None:
        self.progress(f"saving iteration {iteration}")
        self.saver.save(iteration, self.state.sharded(self.optimizer), self.state.info(iteration))
        self.last_saved = iteration

    def _finish_saving(self) -> None:
        if self.saver is None:
            return
        if self.last_saved is None and self.has_learned:  # resumed from another directory, with nothing left to do
            self._save(self.iteration)
        self.progress("the end of saving")
        self.saver.finish()

    def _end_at_bad_steps(self) -> None:
        """Save what the good steps have learned and the batch of the last, skipped step, and raise."""
        arguments = self.arguments
        where = "nothing saved: no --save"
        if self.saver is not None:
            path = Path(arguments.save) / f"bad_batch_iter_{self.iteration:07d}.safetensors"
            with raised_together():
                save_bad_batch(path, self.iteration, self.step.batches, self.micro_batches)
            good = self.iteration - self.bad_steps
            if good > (self.last_saved or 0):
                # Skipped steps have changed nothing, so the state is that of the last good step.
                self._save(good)
            self.saver.finish()
            saved = f"saved at iteration {self.last_saved}" if self.last_saved else "there was no good step to save"
            where = f"its batch is in {path}; {saved}"
        raise MaskLLMError(
            f"iteration {self.iteration}: loss or gradient not finite in {self.bad_steps} steps in a row (--max-bad-steps); {where}"
        )

    def _conclude(self) -> None:
        """Return if all steps were done and one of them was good; else raise, saying what was saved."""
        arguments = self.arguments
        if self._is_last:
            if not self.has_learned:
                raise MaskLLMError(f"loss or gradient not finite in all {self.iteration} steps; nothing learned, nothing saved")
            return
        if not self.has_learned:
            state = "nothing saved: no step was finite"
        elif self.saver is None:
            state = "nothing saved: no --save"
        elif arguments.load is not None and Path(arguments.load).resolve() == Path(arguments.save).resolve():
            state = f"saved at iteration {self.last_saved}; run the same command to go on"
        else:
            state = f"saved at iteration {self.last_saved}; run it with --load {arguments.save} to go on"
        self.stopping.end(self.iteration, state)

    def _build_saver(self) -> CheckpointSaver | None:
        arguments = self.arguments
        if not arguments.save:
            return None
        return CheckpointSaver(
            arguments.save,
            self.start.checkpoint.hf_directory,
            background=arguments.async_save,
            keep_last=arguments.keep_last,
            protected=self.start.checkpoint.path,
            progress=self.progress,
            timeout=SAVE_PATIENCE * 60 * arguments.distributed_timeout_minutes,
        )

    def _progress_bar(self) -> tqdm:
        """A bar on a terminal; if the console is a file it gets the metrics' lines alone."""
        disable = True if self.console is None else None
        return tqdm(
            total=self.arguments.train_iters,
            initial=self.iteration,
            desc="train",
            unit="step",
            disable=disable,
            file=self.console,
        )

    @contextlib.contextmanager
    def _writer(self) -> Iterator[MetricsWriter | None]:
        """On the first rank, the writer of this run's metrics."""
        if self.console is None:
            yield None
            return
        file = Path(self.arguments.save) / "metrics.jsonl" if self.arguments.save else None
        writer = MetricsWriter(file, self.arguments.tensorboard_dir, self.iteration, self.console)
        try:
            yield writer
        finally:
            writer.close()

    def _say(self, line: str) -> None:
        if self.console is not None:
            print(f"maskllm.train: {line}", file=self.console, flush=True)
