"""transformers' `Trainer` for models with masks: what is minimized, which masks are drawn, and what is logged of both."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss

from maskllm.errors import MaskLLMError
from maskllm.finetuning.arguments import SparseTrainingArguments
from maskllm.finetuning.hidden_states import Blocks, States
from maskllm.finetuning.labels import Labels
from maskllm.huggingface.blocks import as_matrix
from maskllm.huggingface.sparse_model import finish, masked_parameters
from maskllm.masking.draw import Draw, keep_draw, open_draw, without_masks
from maskllm.masking.parameter import use_winners, whole
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.patterns import unpack_mask


class SparseTrainer(Trainer):
    """Trains a model that `maskllm.huggingface.sparsify` has put masks into; all else is `Trainer`'s.

    The loss of a step is

        ce * CE + kl * T^2 * KL(teacher || student) + squarehead * sum over blocks of ||f_s - f_t||^2 / ||f_t||^2 - lambda_t * ||W * m||^2

    CE is the model's own loss. CE and KL are means over the step's labels that are not -100, on all processes; SquareHead is a mean over
    the step's batches. The masks of a batch are a function of the seed and of the batch's number in the run, so they do not depend on the
    number of processes, on gradient checkpointing or on a resumption. An evaluation uses the masks that `finish` would keep.
    """

    args: SparseTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel,
        args: SparseTrainingArguments,
        *others: Any,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        """`others` and `kwargs` are `Trainer`'s.

        Args:
            model: the student, with masks.
            teacher: the dense model that the terms of KL and SquareHead compare with: a model of the same shape, such as a copy from before
                pruning. It is frozen. None, with frozen weights: the student's own weights without their masks.

        Raises MaskLLMError if the model has no masks or the teacher has some, if a term of the loss has no teacher or a teacher no term,
        or if the engine does not keep a weight and its mask together.
        """
        self._masked = masked_parameters(model)
        if not self._masked:
            raise MaskLLMError(f"{type(model).__name__}: has no masks; call maskllm.huggingface.sparsify first")
        self._sampler = next(iter(self._masked.values())).sampler
        logits = self._logits()
        trains_weights = any(parameter.requires_grad and id(parameter) not in logits for parameter in model.parameters())
        self._trains_both = bool(logits) and trains_weights
        if args.distills and teacher is None and trains_weights:
            raise MaskLLMError(
                "teacher: none, but the loss has a term for one and the weights are trained; wanted a model, such as copy.deepcopy(model) "
                "from before pruning"
            )
        if teacher is not None and masked_parameters(teacher):
            raise MaskLLMError("teacher: has masks itself; wanted a dense model, such as copy.deepcopy(model) from before sparsify")
        if teacher is not None and not args.distills:
            raise MaskLLMError("teacher: no term of the loss uses it; set kl_loss_coeff or squarehead_loss_coeff")
        if args.fp16 and logits:
            raise MaskLLMError("fp16: it scales the loss, but not the gradient of the masks' regularization; use bf16")
        super().__init__(model, args, *others, **kwargs)
        check_engine(args, self.accelerator.state)
        self.loss_is_scaled_for_ga = True
        # For Trainer: to count the labels of a step for every model. `compute_loss` does not pass their number to the model.
        self.model_accepts_loss_kwargs = True
        # Trainer's own finding is wrong for models whose class is not called ...ForCausalLM, such as GPT2LMHeadModel.
        is_causal = model.loss_function is ForCausalLMLoss and model.can_generate()
        self._loss_shifts_labels = is_causal and not model.config.is_encoder_decoder
        self.teacher = teacher
        self._step, self._batch = -1, 0
        self._terms: dict[str, torch.Tensor] = {}
        """By its name the sum of each term over the steps since the last line of the log."""
        self._steps_summed = 0
        self.add_callback(_Moments(self))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """`Trainer`'s. If masks and weights are trained, a group for the logits comes before those of the weights."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self._trains_both:
            logits = self._logits()
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in logits]
                group["lr"] = self.args.weights_learning_rate
                group["weight_decay"] = self.args.weights_weight_decay if group["weight_decay"] else 0.0
            of_logits = {"params": list(logits.values()), "lr": self.args.learning_rate, "weight_decay": self.args.weight_decay}
            optimizer.add_param_group(of_logits)
            optimizer.param_groups.insert(0, optimizer.param_groups.pop())
        return optimizer

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        return self._clip_apart(model, self.args.max_grad_norm) if self._clips_apart else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor | float:
        if grad_norm is None and self._clips_apart:
            grad_norm = self._clip_apart(model, math.inf)
        return super()._get_grad_norm(model, grad_norm)

    @property
    def _clips_apart(self) -> bool:
        return self._trains_both and not self.is_deepspeed_enabled  # DeepSpeed clips in its own engine

    def _clip_apart(self, model: torch.nn.Module, largest: float) -> torch.Tensor:
        """Clip the gradients of the logits and of all else to `largest`, each by its own norm; returns the logits'.

        `maskllm.training.optimizer.clip_and_step` says why.
        """
        logits = self._logits()
        others = [parameter for parameter in model.parameters() if id(parameter) not in logits]
        self._weights_grad_norm = self.accelerator.clip_grad_norm_(others, largest)
        return self.accelerator.clip_grad_norm_(list(logits.values()), largest)

    def _logits(self) -> dict[int, torch.nn.Parameter]:
        """The logits by their identity."""
        return {id(parameter.logits): parameter.logits for parameter in self._masked.values() if parameter.logits is not None}

    def begin(self) -> None:
        """Prepare what a training needs of the model as the engine has wrapped it."""
        args = self.args
        self._blocks = Blocks(self.model) if args.squarehead_loss_coeff else None
        if self._sampler is not None:
            self._sampler.hard = args.hard
            self._schedule = AnnealingSchedule(
                self.state.max_steps, tuple(args.gumbel_temperature_range), tuple(args.gumbel_scale_range), args.weight_reg
            )
            self._mask_blocks = sum(logits[..., 0].numel() for logits in self._logits().values())
        for module in self.model.modules():
            for name in ("_gradient_checkpointing_func", "checkpoint_fn"):  # transformers' own; that of accelerate's FSDP option
                if isinstance(checkpoint := vars(module).get(name), Callable) and not isinstance(checkpoint, _KeepsDraw):
                    setattr(module, name, _KeepsDraw(checkpoint))
        if self.teacher is not None:
            self.teacher.requires_grad_(False).eval()
            self.teacher.config.use_cache = False
            if self.is_fsdp_enabled:
                self.teacher = fsdp2_prepare_model(self.accelerator, self.teacher)
            elif self.is_deepspeed_enabled:  # it casts the student and the inputs itself, without autocast
                self.teacher.to(args.device, self.model.dtype)
            else:
                self.teacher.to(args.device)
            self._their_blocks = Blocks(self.teacher) if args.squarehead_loss_coeff else None

    def _run_epoch(self, **arguments: Any) -> None:
        """`Trainer`'s. After a resumption from the checkpoint of the last step it would train one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**arguments)
        else:
            self.control.should_training_stop = True

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """`Trainer`'s, in the draw of this batch."""
        step, sampler = self.state.global_step, self._sampler
        if step == self._step:
            self._batch += 1
        else:
            self._step, self._batch = step, 0
            self._steps_summed += 1
        sample = (step * self.args.gradient_accumulation_steps + self._batch) * self.args.world_size + self.args.process_index
        if sampler is not None:
            sampler.temperature, sampler.scale = self._schedule.temperature(step), self._schedule.scale(step)
            sampler.weight_reg = self._schedule.weight_reg_at(step) / self.current_gradient_accumulation_steps
            sampler.stats = torch.zeros(2, dtype=torch.float32, device=self.args.device)
        self._weights_learning_rate = self.optimizer.param_groups[-1]["lr"]
        with open_draw(Draw(sample)):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if sampler is not None:
            squares, probability = sampler.stats
            self._add("regularizer", sampler.weight_reg * squares)
            self._add("mean_max_probability", probability / (self._mask_blocks * self.current_gradient_accumulation_steps))
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """A batch's share of the step's loss; in an evaluation its share of CE among the batches of all processes."""
        args = self.args
        labels = Labels(inputs, shifted=self._loss_shifts_labels)
        if not torch.is_grad_enabled():
            ce, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
            loss = self._share(labels, num_items_in_batch, batches=1) * ce
            return (loss, outputs) if return_outputs else loss
        target, theirs = self._teacher_pass(model, inputs) if args.distills else (None, {})
        with _recorded(self._blocks) as ours:
            # Without num_items_in_batch every model's loss is a mean. With it some models' is, and others' a share of the step's.
            ce, outputs = super().compute_loss(model, dict(inputs), return_outputs=True)
        if labels.count == 0:
            ce = 0 * outputs["logits"].sum()  # a mean over nothing is not a number
        share = self._share(labels, num_items_in_batch, batches=self.current_gradient_accumulation_steps)
        loss = args.ce_loss_coeff * self._add("cross_entropy", share * ce)
        if args.kl_loss_coeff:
            kl = labels.mean_divergence(outputs["logits"], target, args.kl_temperature)
            loss = loss + args.kl_loss_coeff * self._add("kl", share * kl)
        if args.squarehead_loss_coeff:
            term = self._blocks.squarehead(ours, theirs, inputs) / self.current_gradient_accumulation_steps
            loss = loss + args.squarehead_loss_coeff * self._add("squarehead", term)
        return (loss, outputs) if return_outputs else loss

    def _share(self, labels: Labels, num_items_in_batch: torch.Tensor | int | None, *, batches: int) -> torch.Tensor | float:
        """What a batch's mean counts in the step's: its part of the labels, times the processes that are averaged over.

        Without labels it is one of `batches` on its process.
        """
        if num_items_in_batch is None or labels.count is None:
            return 1 / batches
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return processes * labels.count / num_items_in_batch

    @torch.no_grad()
    def _teacher_pass(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, States]:
        """The teacher's logits and hidden states."""
        if not self.model.config.is_encoder_decoder:  # whose decoder reads the labels
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self.teacher is not None:
            with _recorded(self._their_blocks) as states, self.accelerator.autocast():
                return self.teacher(**inputs)["logits"], states
        model.eval()
        with _recorded(self._blocks) as states, without_masks():
            logits = model(**inputs)["logits"]
        model.train()
        return logits, states

    def _add(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Add a value to its term of the log; returns it."""
        self._terms[name] = self._terms.get(name, 0) + value.detach()
        return value

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer`'s, with the masks that `finish` would keep now."""
        with use_winners(list(self._masked.values())):
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """`Trainer`'s. A line of the training also has the terms of the loss: means over the steps since the last one."""
        if "loss" in logs and self._terms:
            sums = self.accelerator.reduce(torch.stack(list(self._terms.values())), "mean")
            logs |= {name: value / self._steps_summed for name, value in zip(self._terms, sums.tolist(), strict=True)}
            self._terms, self._steps_summed = {}, 0
            if self._sampler is not None:
                logs |= {"temperature": self._sampler.temperature, "scale": self._sampler.scale}
            if self._trains_both:
                logs["weights_learning_rate"] = self._weights_learning_rate
            if self._clips_apart:
                logs["weights_grad_norm"] = float(self._weights_grad_norm)
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """`Trainer`'s, and while there are masks under the model's own names.

        `save_pretrained` gives some families' tensors older names, which `Trainer` does not know when it resumes: it would leave the
        parameters as they are, with a warning.
        """
        if masked_parameters(self.model):
            self.model.save_pretrained = functools.partial(self.model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            vars(self.model).pop("save_pretrained", None)

    def finish(self) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
        """`maskllm.huggingface.finish` of the trained model; under FSDP2 of a copy, which is whole and on the CPU of every process.

        The model computes in the dtype of its weights again, with `bf16` too.
        """
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if not self.is_fsdp_enabled:
            return finish(model)
        tensors = {name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}
        (kind,) = (base for base in type(model).__bases__ if issubclass(base, PreTrainedModel))
        copy = kind(model.config)
        copy.generation_config = model.generation_config
        plain = {name: tensor for name, tensor in tensors.items() if not name.endswith((".mask_bits", ".mask_logits"))}
        copy.load_state_dict(plain, assign=True)
        copy.tie_weights()
        masks = {}
        for name, parameter in self._masked.items():
            linear = copy.get_submodule(name)
            bits = parameter.bits if parameter.logits is None else parameter.winner_bits()
            mask = masks[f"{name}.weight"] = as_matrix(linear, unpack_mask(bits.cpu(), parameter.shape[1]))
            linear.weight.data.mul_(mask)
        return copy, masks


def _recorded(blocks: Blocks | None) -> contextlib.AbstractContextManager[States]:
    """The hidden states after `blocks`; none without blocks."""
    return contextlib.nullcontext({}) if blocks is None else blocks.recorded()


class _Moments(TrainerCallback):
    """What the trainer does between `Trainer`'s own steps."""

    def __init__(self, trainer: SparseTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.begin()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Write the zeros again: Adam and its like keep them, but an optimizer that mixes a weight's entries does not."""
        for parameter in self._trainer._masked.values():
            if parameter.logits is None:
                parameter.write_zeros()


class _KeepsDraw:
    """Activation checkpointing whose recomputation draws the masks of the forward pass, on whichever thread it runs."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self._checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._checkpoint(keep_draw(function), *args, **kwargs)


def check_engine(args: SparseTrainingArguments, state: AcceleratorState) -> None:
    """Raise MaskLLMError if the engine cuts weights without regard to their rows, copies modules for each GPU, or is not the one wanted."""
    if args.n_gpu > 1:
        raise MaskLLMError(
            f"one process for {args.n_gpu} GPUs: wanted one for each; start it by torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES to one GPU"
        )
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if fsdp is None and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise MaskLLMError(
            "FSDP: accelerate shards models on GPUs only, in processes of torchrun or accelerate launch; here each process would hold the "
            "whole model, so leave it out"
        )
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise MaskLLMError("fsdp_version 1 flattens weights, so masks and weights come apart; use fsdp_version 2")
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise MaskLLMError("DeepSpeed ZeRO 3 flattens weights, so masks and weights come apart; use FSDP2, or ZeRO 1 or 2")
