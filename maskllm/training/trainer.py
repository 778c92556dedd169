"""Mask learning: the step loop and what it holds."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from tqdm import tqdm

from maskllm.distributed import device
from maskllm.errors import MaskLLMError
from maskllm.layers.recompute import set_sample
from maskllm.layers.spec import masked_linears
from maskllm.masking.sampler import VALIDATION_SAMPLES, MaskMode, MaskSampler
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.training.arguments import TrainArguments
from maskllm.training.checkpointing import Start, load_training_state, resolve_start, save_training_state
from maskllm.training.data import Batches, build_batches
from maskllm.training.metrics import MetricsWriter, WinnerTracker, peak_memory_bytes
from maskllm.training.optimizer import build_lr_scheduler, build_optimizer


class Trainer:
    """One rank's share of a mask-learning run: `Trainer(arguments).train()` inside `parallel_processes`."""

    def __init__(self, arguments: TrainArguments) -> None:
        self.arguments = arguments
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
            recompute_masked_weight=arguments.recompute_granularity == "selective"
            and "masked_weight" in arguments.recompute_modules,
        )
        self.start: Start = resolve_start(arguments, pattern)

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
            load_training_state(self.start, self.model.module, self.optimizer)
            self.lr_scheduler.step(self.iteration * arguments.global_batch_size)
        self.train_batches, self.valid_batches = build_batches(arguments, self.start.model_config.vocab_size, device())
        self.tracker = WinnerTracker(self.layers)
        self.num_blocks = _model_parallel_sum(sum(layer.mask_logits[..., 0].numel() for layer in self.layers))
        self.stop_signal: int | None = None

    def train(self) -> None:
        """Run to the last step, or to the step in which SIGTERM or SIGINT arrives; writes a checkpoint on the way out of either."""
        arguments = self.arguments
        writer = self._open_writer()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        last_saved = self.iteration if self.start.resumed else None
        window: list[tuple[torch.Tensor, float, float]] = []
        with tqdm(
            total=arguments.train_iters, initial=self.iteration, desc="train", unit="step", disable=writer is None, file=sys.stderr
        ) as bar:
            started = time.perf_counter()
            while self.iteration < arguments.train_iters:
                losses, grad_norm, lr = self._step()
                self.iteration += 1
                window.append((losses, grad_norm, lr))
                bar.update()
                if self.iteration % arguments.log_interval == 0 or self.iteration == arguments.train_iters:
                    values = self._train_metrics(window, time.perf_counter() - started)
                    if writer is not None:
                        bar.set_postfix(loss=f"{values['loss']:.3f}")
                        bar.clear()
                        writer.write("train", self.iteration, values)
                    window, started = [], time.perf_counter()
                if self.valid_batches and (
                    self.iteration % arguments.eval_interval == 0 or self.iteration == arguments.train_iters
                ):
                    values = self._validate()
                    if writer is not None:
                        bar.clear()
                        writer.write("validation", self.iteration, values)
                    started = time.perf_counter()
                stop = self._stop_requested()
                if arguments.save and (
                    stop
                    or self.iteration == arguments.train_iters
                    or (arguments.save_interval and self.iteration % arguments.save_interval == 0)
                ):
                    save_training_state(self.start, arguments, self.iteration, self.model.module, self.optimizer)
                    last_saved = self.iteration
                    started = time.perf_counter()
                if stop:
                    break
        if writer is not None:
            writer.close()
        if self.stop_signal is not None or self.iteration < arguments.train_iters:
            where = f"saved at iteration {last_saved}" if last_saved is not None else "nothing saved: no --save"
            raise MaskLLMError(f"stopped by a signal after iteration {self.iteration}; {where}; run the same command to go on")

    def _step(self) -> tuple[torch.Tensor, float, float]:
        """One optimizer step; returns this rank's (loss sum, loss count, sum of squares, sum of maximum probabilities), the
        gradient's norm and the learning rate."""
        arguments = self.arguments
        sampler = self.sampler
        sampler.mode = MaskMode.SAMPLE
        sampler.temperature = self.schedule.temperature(self.iteration)
        sampler.scale = self.schedule.scale(self.iteration)
        sampler.weight_reg = self.schedule.weight_reg_at(self.iteration) / self.num_microbatches
        sampler.stats = torch.zeros(2, dtype=torch.float32, device=device())
        for param_group in self.optimizer.param_groups:
            lr = param_group["lr"]
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
        updated, grad_norm, _ = self.optimizer.step()
        if not updated:
            raise MaskLLMError(f"iteration {self.iteration + 1}: the optimizer found a gradient that is not finite")
        self.lr_scheduler.step(increment=arguments.global_batch_size)
        return torch.cat([losses, sampler.stats]), float(grad_norm), float(lr)

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
        losses = [report["lm loss"] for report in reports]
        total = torch.zeros(2, dtype=torch.float32, device=device())
        if losses:
            total[0], total[1] = torch.stack(losses).sum(), len(losses)
        return total

    def _finish_gradients(self, model: list[torch.nn.Module], *_: Any, **__: Any) -> None:
        # Only logits have gradients, and each rank owns its logits: the reduction over data-parallel ranks is all there is. Upstream's
        # finalize_model_grads would go on to norms and tied embeddings, which are frozen here.
        for chunk in model:
            chunk.finish_grad_sync()

    def _train_metrics(self, window: list[tuple[torch.Tensor, float, float]], seconds: float) -> dict[str, Any]:
        """Metrics of the steps in `window`, the same on every rank."""
        steps = len(window)
        since_last, since_prior = self.tracker.changed()
        local = torch.stack([losses for losses, _, _ in window]).double()
        losses = local[:, :2].sum(0)
        if parallel_state.get_tensor_model_parallel_rank() != 0:
            losses.zero_()
        dist.all_reduce(losses)
        # Every data-parallel rank draws its own masks; all of them count.
        draws = self.num_microbatches * self.dp_size
        squares, probability = local[:, 2].clone(), local[:, 3].clone()
        for values in (squares, probability):
            dist.all_reduce(values)
        reg_weights = [self.schedule.weight_reg_at(self.iteration - steps + i) for i in range(steps)]
        regularizer = sum(w * s / draws for w, s in zip(reg_weights, squares.tolist(), strict=True)) / steps
        memory = torch.tensor(float(peak_memory_bytes()), dtype=torch.float64, device=device())
        dist.all_reduce(memory, op=dist.ReduceOp.MAX)
        tokens = steps * self.arguments.global_batch_size * self.arguments.seq_length
        has_prior = self.layers[0].mask_bits is not None
        return {
            "loss": float(losses[0] / losses[1]),
            "regularizer": regularizer,
            "temperature": self.sampler.temperature,
            "scale": self.sampler.scale,
            "mean_max_probability": float(probability.sum()) / (steps * draws * self.num_blocks),
            "changed_since_last": _model_parallel_sum(since_last) / self.num_blocks,
            "changed_since_prior": _model_parallel_sum(since_prior) / self.num_blocks if has_prior else None,
            "grad_norm": sum(norm for _, norm, _ in window) / steps,
            "learning_rate": window[-1][2],
            "tokens_per_second": tokens / seconds,
            "peak_memory_gib": float(memory) / 2**30,
        }

    def _validate(self) -> dict[str, float]:
        """Mean loss on the validation batches with sampled and with arg-max masks, the same on every rank."""
        sampler = self.sampler
        sampler.stats = None
        sampler.weight_reg = 0.0
        count = self.arguments.eval_iters * self.num_microbatches
        means = {}
        self.model.eval()
        for name, mode in (("loss_sampled", MaskMode.SAMPLE), ("loss_winner", MaskMode.WINNER)):
            sampler.mode = mode
            with torch.no_grad():
                losses = self._run(
                    self.valid_batches, 0, count, sample_of=lambda index: VALIDATION_SAMPLES + index, forward_only=True
                ).double()
            if parallel_state.get_tensor_model_parallel_rank() != 0:
                losses.zero_()
            dist.all_reduce(losses)
            means[name] = float(losses[0] / losses[1])
        self.model.train()
        return means

    def _open_writer(self) -> MetricsWriter | None:
        """On the first rank, the writer of this run's metrics."""
        if dist.get_rank() != 0:
            return None
        file = Path(self.arguments.save) / "metrics.jsonl" if self.arguments.save else None
        return MetricsWriter(file, self.arguments.tensorboard_dir, self.iteration)

    def _request_stop(self, number: int, _: Any) -> None:
        self.stop_signal = number

    def _stop_requested(self) -> bool:
        """Whether any rank has been asked to stop."""
        flag = torch.tensor(float(self.stop_signal is not None), device=device())
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


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
