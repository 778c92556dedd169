"""Mask learning: the step loop and what it holds."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from tqdm import tqdm

from maskllm.checkpoints.saving import CheckpointSaver, remove_leftovers
from maskllm.distributed import any_rank, device, raised_together
from maskllm.errors import MaskLLMError, StoppedError
from maskllm.masking.draw import set_sample
from maskllm.masking.sampler import VALIDATION_SAMPLES, MaskMode, MaskSampler
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.megatron.spec import masked_linears
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import Batches, DataFiles, build_batches
from maskllm.training.metrics import MetricsWriter, WinnerTracker, peak_memory_bytes
from maskllm.training.optimizer import build_lr_scheduler, build_optimizer
from maskllm.training.start import Start, load_training_state, resolve_start, sharded_training_state, training_info
from maskllm.training.surviving.bad_batch import save_bad_batch

SAVE_PATIENCE = 6
"""How many times `--distributed-timeout-minutes` a checkpoint may take to write: a file system may be much slower than a network."""


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the metrics."""

    sums: torch.Tensor
    """This rank's fp32 (sum of losses, their number, sum of squares, sum of maximum probabilities)."""
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    """Whether the loss or a gradient was not finite on some rank, so that nothing was updated on any."""


class Trainer:
    """One rank's share of a mask-learning run: `Trainer(arguments).train()` inside `parallel_processes`.

    Args:
        console: On the first rank, where the run's progress is shown.
        progress: Called with what this rank is about to do, and without arguments for each micro-batch of it, for a watchdog.
    """

    def __init__(
        self,
        arguments: TrainArguments,
        *,
        console: TextIO | None = None,
        progress: Callable[..., None] = lambda *_: None,
    ) -> None:
        self.arguments = arguments
        self.console = console
        self.progress = progress
        pattern = arguments.check()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.num_microbatches = arguments.num_microbatches(self.dp_size)
        self.schedule = AnnealingSchedule(
            arguments.train_iters, arguments.gumbel_temperature_range, arguments.gumbel_scale_range, arguments.weight_reg
        )
        self.sampler = MaskSampler(
            pattern=pattern,
            seed=arguments.seed,
            hard=arguments.hard,
            recompute_masked_weight=arguments.recomputes("masked_weight"),
        )
        if arguments.save and dist.get_rank() == 0:
            remove_leftovers(Path(arguments.save))
        dist.barrier()
        self.progress("verifying the checkpoint")
        self.start: Start = resolve_start(arguments, pattern, say=self._say)
        self._say(
            f"resuming {self.start.checkpoint.path} after iteration {self.start.iteration} of {arguments.train_iters}"
            if self.start.resumed
            else f"starting from {self.start.checkpoint.path}"
        )

        self.progress("loading the checkpoint")
        model = self.start.build_model(self.sampler)
        self.layers = list(masked_linears(model))
        model.config.finalize_model_grads_func = self._finish_gradients
        model.config.no_sync_func = None
        self.model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=arguments.mask_logits_dtype == "fp32",
                overlap_grad_reduce=False,
                use_distributed_optimizer=arguments.use_distributed_optimizer,
            ),
            model,
        )
        self.optimizer = build_optimizer(arguments, self.model)
        self.lr_scheduler = build_lr_scheduler(arguments, self.optimizer)
        self.iteration = self.start.iteration
        """Steps done."""
        if self.start.resumed:
            self.progress("loading the training state")
            load_training_state(self.start, self.model.module, self.optimizer)
            self.lr_scheduler.step(self.iteration * arguments.global_batch_size)
        self.progress("opening the data")
        self.train_batches, self.valid_batches = build_batches(arguments, self.start.model_config.vocab_size, device())
        # One rank of each machine looks after the files, for the file system's sake.
        self.data_files = DataFiles(arguments.blend()[0] if os.environ.get("LOCAL_RANK", "0") == "0" else [])
        self.tracker = WinnerTracker(self.layers)
        self.num_blocks = _model_parallel_sum(sum(layer.mask_logits[..., 0].numel() for layer in self.layers))
        self.saver = (
            CheckpointSaver(
                arguments.save,
                self.start.checkpoint.hf_directory,
                background=arguments.async_save,
                keep_last=arguments.keep_last,
                protected=self.start.checkpoint.path,
                progress=self.progress,
                patience=SAVE_PATIENCE * 60 * arguments.distributed_timeout_minutes,
            )
            if arguments.save
            else None
        )
        self.losses: list[torch.Tensor] = []
        """Of the last step's micro-batches, on the last pipeline stage."""
        self.bad_steps = 0
        """Steps in a row that were skipped."""
        self.has_learned = self.start.resumed
        """Whether there has been a good step; before, torch's Adam has no state that a checkpoint could hold."""
        self.stop_signal: int | None = None
        self.stopping = False
        """Whether some rank has been asked to stop, as all ranks know."""
        self.data_problem: str | None = None
        """What this rank found amiss with a file of the dataset in the last step."""
        self.data_gone = False
        """Whether some rank misses a file of the dataset, as all ranks know."""

    def train(self) -> None:
        """Run to the last step, or to the one in which SIGTERM, SIGINT or SIGHUP arrives or a file of the dataset disappears.

        With `--save` it leaves a checkpoint of the last good step, if there was one, on each of these ways, and where steps are not finite.

        Raises StoppedError after a signal, and MaskLLMError where the data are gone, a checkpoint or the metrics cannot be written, no step
        was finite, or as many as `--max-bad-steps` in a row were not.
        """
        arguments = self.arguments
        writer = self._open_writer()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # which nohup has asked for
                signal.signal(number, self._request_stop)
        last_saved = self.iteration if self.start.resumed and self.start.lies_in_save else None
        window: list[StepResult] = []
        # A bar on a terminal; a file gets the lines alone.
        bar_off = True if self.console is None else None
        with tqdm(
            total=arguments.train_iters, initial=self.iteration, desc="train", unit="step", disable=bar_off, file=self.console
        ) as bar:
            started, paused = time.perf_counter(), 0.0  # for validations and saves
            while self.iteration < arguments.train_iters:
                self.progress(f"iteration {self.iteration + 1}")
                window.append(self._step())
                self.iteration += 1
                bar.update()
                if self.iteration % arguments.log_interval == 0 or self.iteration == arguments.train_iters:
                    values = self._train_metrics(window, time.perf_counter() - started - paused)
                    if writer is not None:
                        bar.set_postfix({key: f"{values[key]:.3f}" for key in ("loss",) if values[key] is not None})
                        bar.clear()
                        writer.write("train", self.iteration, values)
                    window, started, paused = [], time.perf_counter(), 0.0
                if self.bad_steps == arguments.max_bad_steps:
                    self._end_at_bad_steps(last_saved or 0)
                last = self.iteration == arguments.train_iters
                pause = time.perf_counter()
                if self.valid_batches and not self._ends_early and (last or self.iteration % arguments.eval_interval == 0):
                    self.progress(f"the validation after iteration {self.iteration}")
                    self.model.eval()
                    values = self._validate()
                    self.model.train()
                    if values is None:
                        self._say(f"a signal has broken off the validation after iteration {self.iteration}")
                    elif writer is not None:
                        bar.clear()
                        writer.write("validation", self.iteration, values)
                if self.saver is not None:
                    self.saver.poll()
                    due = last or self._ends_early or (arguments.save_interval and self.iteration % arguments.save_interval == 0)
                    # Steps that are skipped in a row may be wanted again, once their cause is gone; those of a run that is over are not.
                    done = self.iteration if last else self.iteration - self.bad_steps
                    if due and self.has_learned and (done > (last_saved or 0) or self._ends_early):
                        self._save(done)
                        last_saved = done
                paused += time.perf_counter() - pause
                if last or self._ends_early:
                    break
            if self.saver is not None:
                if last_saved is None and self.has_learned:  # resumed from elsewhere, with nothing left to do
                    self._save(self.iteration)
                self.progress("the end of saving")
                self.saver.finish()
        if writer is not None:
            writer.close()
        if self.iteration == arguments.train_iters:
            if not self.has_learned:
                raise MaskLLMError(f"loss or gradient not finite in all {self.iteration} steps; nothing learned, nothing saved")
            return
        if not self.has_learned:
            state = "nothing saved: no step was finite"
        elif self.saver is None:
            state = "nothing saved: no --save"
        elif arguments.load is not None and Path(arguments.load).resolve() == Path(arguments.save).resolve():
            state = f"saved at iteration {last_saved}; run the same command to go on"
        else:
            state = f"saved at iteration {last_saved}; run it with --load {arguments.save} to go on"
        if self.data_gone:
            with raised_together():
                if self.data_problem is not None:
                    raise MaskLLMError(f"{self.data_problem}; {state}")
        raise StoppedError(f"stopped by a signal after iteration {self.iteration}; {state}")

    @property
    def _ends_early(self) -> bool:
        """Whether all ranks are to stop after this step, with a checkpoint and without anything that takes long."""
        return self.stopping or self.data_gone

    def _save(self, iteration: int) -> None:
        start = self.start
        self.progress(f"saving iteration {iteration}")
        self.saver.save(
            iteration,
            sharded_training_state(start, self.model.module, self.optimizer),
            training_info(start, self.arguments, iteration),
        )

    def close(self) -> None:
        """Remove the checkpoint that is half-written, where the training has failed."""
        if self.saver is not None:
            self.saver.abandon()

    def _step(self) -> StepResult:
        """One optimizer step; where the loss or a gradient is not finite on any rank, all ranks leave logits and optimizer as they are."""
        arguments = self.arguments
        sampler = self.sampler
        sampler.mode = MaskMode.SAMPLE
        sampler.temperature = self.schedule.temperature(self.iteration)
        sampler.scale = self.schedule.scale(self.iteration)
        sampler.weight_reg = self.schedule.weight_reg_at(self.iteration) / self.num_microbatches
        sampler.stats = torch.zeros(2, dtype=torch.float32, device=device())
        lr = self.optimizer.param_groups[0]["lr"]
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        first = self.iteration * self.num_microbatches * self.dp_size
        one_draw = arguments.mask_sample_interval == "step"
        losses = self._run(
            self.train_batches,
            first,
            self.num_microbatches,
            sample_of=lambda index: self.iteration if one_draw else first + index,
            forward_only=False,
        )
        sums = torch.cat([losses, sampler.stats])
        problem = self._not_finite(sums)
        self.data_problem = self.data_files.problem()
        for line in filter(None, (problem, self.data_problem)):
            print(f"iteration {self.iteration + 1}: {line}", file=sys.stderr, flush=True)
        skipped, self.stopping, self.data_gone = any_rank(
            problem is not None, self.stop_signal is not None, self.data_problem is not None
        )
        grad_norm = 0.0
        if skipped:
            self.bad_steps += 1
        else:
            self.bad_steps = 0
            self.has_learned = True
            updated, norm, _ = self.optimizer.step()
            if not updated:
                raise MaskLLMError(f"iteration {self.iteration + 1}: the optimizer found a gradient that is not finite")
            grad_norm = float(norm)
        self.lr_scheduler.step(increment=arguments.global_batch_size)
        return StepResult(sums, grad_norm, float(lr), skipped)

    def _not_finite(self, sums: torch.Tensor) -> str | None:
        """What of this rank's losses and gradients is not finite; None where all are."""
        if not bool(torch.isfinite(sums).all()):
            return f"the loss is not finite on this rank: {[float(loss) for loss in self.losses]}"
        for buffer in self.model.buffers:
            # The largest magnitude: one pass without a copy, and not finite where any entry is not.
            if not bool(torch.isfinite(torch.linalg.vector_norm(buffer.grad_data, ord=torch.inf))):
                return "a gradient is not finite on this rank"
        return None

    def _end_at_bad_steps(self, last_saved: int) -> None:
        """Save what the good steps have learned and the batch of the step that has just been skipped, and raise."""
        arguments = self.arguments
        first = (self.iteration - 1) * self.num_microbatches * self.dp_size
        where = "nothing saved: no --save"
        if self.saver is not None:
            path = Path(arguments.save) / f"bad_batch_iter_{self.iteration:07d}.safetensors"
            with raised_together():
                save_bad_batch(path, self.iteration, self.train_batches, first, self.num_microbatches, self.losses)
            good = self.iteration - self.bad_steps
            if good > last_saved:
                # Skipped steps have changed nothing: this is the state that they were met in.
                self._save(good)
            self.saver.finish()
            saved = max(good, last_saved)
            where = f"its batch is in {path}; {f'saved at iteration {saved}' if saved else 'there was no good step to save'}"
        raise MaskLLMError(
            f"iteration {self.iteration}: loss or gradient not finite in {self.bad_steps} steps in a row (--max-bad-steps); {where}"
        )

    def _run(
        self, batches: Batches, first_batch: int, count: int, *, sample_of: Callable[[int], int], forward_only: bool
    ) -> torch.Tensor:
        """Run `count` micro-batches of this data-parallel rank through the pipeline; returns fp32 (sum of losses, their number).

        Batch `first_batch + i`, where i counts the micro-batches of all data-parallel ranks, meets the masks of the global sample
        index `sample_of(i)`.
        """
        numbers = iter(range(count))

        def forward_step(_: Any, model: torch.nn.Module, *__: Any) -> tuple[torch.Tensor, Any]:
            index = next(numbers) * self.dp_size + self.dp_rank
            self.progress()
            set_sample(sample_of(index))
            batch = batches[first_batch + index]
            output = model(batch.tokens, batch.position_ids, None, labels=batch.labels)
            return output, _mean_loss

        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=self.model,
            num_microbatches=count,
            seq_length=self.arguments.seq_length,
            micro_batch_size=self.arguments.micro_batch_size,
            forward_only=forward_only,
        )
        self.losses = losses = [report["lm loss"] for report in reports]
        total = torch.zeros(2, dtype=torch.float32, device=device())
        if losses:
            total[0], total[1] = torch.stack(losses).sum(), len(losses)
        return total

    def _finish_gradients(self, model: list[torch.nn.Module], *_: Any, **__: Any) -> None:
        # Only logits have gradients, and each rank owns its logits: the reduction over data-parallel ranks is all there is. Upstream's
        # finalize_model_grads would go on to norms and tied embeddings, which are frozen here.
        for chunk in model:
            chunk.finish_grad_sync()

    def _train_metrics(self, window: list[StepResult], seconds: float) -> dict[str, Any]:
        """Metrics of the steps in `window`, the same on every rank; None where they would be means over steps that were all skipped."""
        good = [step for step in window if not step.skipped]
        steps = len(good)
        since_last, since_prior = self.tracker.changed()
        local = torch.stack([step.sums for step in good] or [torch.zeros_like(window[0].sums)]).double()
        losses = local[:, :2].sum(0)
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            losses.zero_()
        dist.all_reduce(losses)
        # Every data-parallel rank draws its own masks; all of them count.
        draws = self.num_microbatches * self.dp_size
        squares, probability = local[:, 2].clone(), local[:, 3].clone()
        for values in (squares, probability):
            dist.all_reduce(values)
        first = self.iteration - len(window)
        reg_weights = [self.schedule.weight_reg_at(first + i) for i, step in enumerate(window) if not step.skipped]
        regularizer = sum(w * s / draws for w, s in zip(reg_weights, squares.tolist(), strict=False))
        memory = torch.tensor(float(peak_memory_bytes()), dtype=torch.float64, device=device())
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        tokens = len(window) * self.arguments.global_batch_size * self.arguments.seq_length
        has_prior = self.layers[0].mask_bits is not None
        return {
            "loss": float(losses[0] / losses[1]) if steps else None,
            "regularizer": regularizer / steps if steps else None,
            "temperature": self.sampler.temperature,
            "scale": self.sampler.scale,
            "mean_max_probability": float(probability.sum()) / (steps * draws * self.num_blocks) if steps else None,
            "changed_since_last": _model_parallel_sum(since_last) / self.num_blocks,
            "changed_since_prior": _model_parallel_sum(since_prior) / self.num_blocks if has_prior else None,
            "grad_norm": sum(step.grad_norm for step in good) / steps if steps else None,
            "skipped_steps": len(window) - steps,
            "learning_rate": window[-1].learning_rate,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": float(memory) / 2**30,
        }

    def _validate(self) -> dict[str, float] | None:
        """Mean loss on the validation batches with sampled and with arg-max masks, the same on every rank; None once a rank is to stop."""
        sampler = self.sampler
        sampler.stats = None
        sampler.weight_reg = 0.0
        means = {}
        for name, mode in (("loss_sampled", MaskMode.SAMPLE), ("loss_winner", MaskMode.WINNER)):
            sampler.mode = mode
            losses = torch.zeros(2, dtype=torch.float64, device=device())
            for batch in range(self.arguments.eval_iters):
                first = batch * self.num_microbatches * self.dp_size
                with torch.no_grad():
                    losses += self._run(
                        self.valid_batches,
                        first,
                        self.num_microbatches,
                        sample_of=lambda index, first=first: VALIDATION_SAMPLES + first + index,
                        forward_only=True,
                    )
                (self.stopping,) = any_rank(self.stop_signal is not None)
                if self.stopping:
                    return None
            if parallel_state.get_tensor_model_parallel_rank() != 0:
                losses.zero_()
            dist.all_reduce(losses)
            means[name] = float(losses[0] / losses[1])
        return means

    def _open_writer(self) -> MetricsWriter | None:
        """On the first rank, the writer of this run's metrics."""
        if self.console is None:
            return None
        file = Path(self.arguments.save) / "metrics.jsonl" if self.arguments.save else None
        return MetricsWriter(file, self.arguments.tensorboard_dir, self.iteration, self.console)

    def _say(self, line: str) -> None:
        if self.console is not None:
            print(f"maskllm.train: {line}", file=self.console, flush=True)

    def _request_stop(self, number: int, _: Any) -> None:
        self.stop_signal = number


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch from its tokens' losses, fp32 [micro batch, sequence]."""
    loss = losses.mean()
    # A copy, since upstream divides the loss by the number of micro-batches in place.
    return loss, {"lm loss": loss.detach().clone()}


def _model_parallel_sum(value: float) -> float:
    """Sum over the ranks that hold parts of one model."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return float(total)
