"""A run's state: the model that it starts with, and what its checkpoints hold to continue exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from maskllm.checkpoints.info import CheckpointInfo
from maskllm.checkpoints.reading import Checkpoint, load_model, load_tensors
from maskllm.distributed import any_rank, raised_together
from maskllm.environment.optional_parts import resolve_transformer_impl
from maskllm.errors import MaskLLMError
from maskllm.families.model_config import ModelConfig
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model
from maskllm.megatron.distillation import StudentAndTeacher
from maskllm.megatron.gpt import MaskedGPTModel
from maskllm.megatron.linears import attach_bits, attach_logits, attach_scales, masked_linears, masked_parameters
from maskllm.megatron.loss import LossTerms
from maskllm.training.arguments import TrainArguments
from maskllm.training.optimizer import fit_adam_state, unchained
from maskllm.training.start import Start, settings_of
from maskllm.training.trainables import MASK_LOGITS, is_trained


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """This rank's part of everything that the next step depends on."""

    start: Start
    model: MaskedGPTModel
    originals: dict[str, torch.Tensor]
    """The frozen tensors that the checkpoint stores in another type than training computes in: in that type, on the host, by name.

    Checkpoints of this run hold them instead of the model's, so that weights leave training bit-identical.
    """
    unrounded: dict[str, torch.Tensor]
    """The trained tensors of the same kind."""

    @classmethod
    def load(cls, start: Start, sampler: MaskSampler) -> TrainingState:
        """Build the model with weights and masks loaded: with learnable logits, with scales (`--weights-optimizer cast`), or with fixed
        masks and zeros in the weights.

        A new run's logits are those of the run that it starts from. If that has none, they are drawn and, if there is a prior, moved toward
        it. `load_optimizer` loads the state of a resumed run. A new run with fixed masks has its start's masks, or the winners of its
        start's logits. A new run with scales has no masks before its first step.
        """
        arguments = start.arguments
        model = _build(start.model_config, arguments, recomputation=arguments.recomputation())
        masked = masked_parameters(model)
        has_bits, has_logits = start.checkpoint.has_mask_bits, start.checkpoint.has_mask_logits
        if start.checkpoint.has_weight_scales:
            attach_scales(model, sampler)
        elif has_bits:
            attach_bits(model)
        if has_logits:
            attach_logits(model, sampler, dtype=arguments.logits_dtype)
        load_model(start.checkpoint, model)
        if arguments.chooses_masks and not start.resumed:
            _check_dense(model, f"{start.checkpoint.path}: masks are chosen from dense weights, and")
        originals = _load_originals(start.checkpoint, model)
        unrounded = {name: originals.pop(name) for name in list(originals) if is_trained(name, arguments)}
        if arguments.trains_masks and not has_logits:
            attach_logits(model, sampler, dtype=arguments.logits_dtype)
            for parameter in masked:
                parameter.reset(arguments.prior_strength if has_bits else None)
        if arguments.uses_cast and not start.checkpoint.has_weight_scales:
            attach_scales(model, sampler)
        if not arguments.chooses_masks:
            for parameter in masked:
                if has_logits:
                    parameter.fix_winner()
                parameter.write_zeros()
        return cls(start, model, originals, unrounded)

    def pair_with_teacher(self) -> StudentAndTeacher | None:
        """The model with its teacher; None if no term of the loss needs one.

        Raises MaskLLMError if a weight of the teacher is not finite, or if its weights are sparse.
        """
        arguments, checkpoint = self.start.arguments, self.start.teacher
        if not arguments.distills:
            return None
        teacher = None
        if checkpoint is not None:
            # The vocabulary's padding may differ in the files, but the logits of both models are compared column by column.
            config = dataclasses.replace(checkpoint.model_config, vocab_padding=self.start.model_config.vocab_padding)
            teacher = _build(config, arguments).eval()
            load_model(checkpoint, teacher)
            with raised_together():
                for name, parameter in teacher.named_parameters():
                    if not bool(torch.isfinite(parameter).all()):
                        raise MaskLLMError(f"--teacher {checkpoint.path}: tensor {name} has values that are not finite")
            _check_dense(teacher, f"--teacher {checkpoint.path}: a teacher is a dense model, and")
        terms = LossTerms(arguments.ce_loss_coeff, arguments.kl_loss_coeff, arguments.kl_temperature)
        return StudentAndTeacher(self.model, teacher, terms, arguments.squarehead_loss_coeff)

    @torch.no_grad()
    def start_masters(self, optimizer: MegatronOptimizer) -> None:
        """Start a new run's masters from the checkpoint's values, which may have more bits than the model's weights.

        Weights that a fixed mask has set to zero stay zero.
        """
        one = unchained(optimizer)
        parameters = dict(self.model.named_parameters())
        for name, stored in self.unrounded.items():
            parameter = parameters[name]
            master = getattr(parameter, "main_param", None)
            if master is None:  # an fp32 weight is its own master; in the distributed optimizer another rank may hold it
                continue
            values = stored.to(master.device, torch.float32).masked_fill_(parameter == 0, 0)
            if isinstance(one, DistributedOptimizer):
                here = one._get_model_param_range_map(parameter)["param"]
                values = values.view(-1)[here.start : here.end]
            master.copy_(values)
        self.unrounded.clear()

    def load_optimizer(self, optimizer: MegatronOptimizer) -> None:
        """Read the model's tensors and the optimizer's state of a resumed run, under any layout."""
        _make_room(optimizer)
        state = self.start.checkpoint.load(self._sharded(optimizer, is_loading=True))
        load_tensors(self.model, state["model"])
        fit_adam_state(state["optimizer"], optimizer)
        optimizer.load_state_dict(state["optimizer"])

    def sharded(self, optimizer: MegatronOptimizer) -> dict[str, Any]:
        """What `CheckpointSaver.save` writes."""
        state = self._sharded(optimizer, is_loading=False)
        for name, tensor in self.originals.items():
            state["model"][name] = _with_data(state["model"][name], tensor)
        return state

    def info(self, iteration: int) -> CheckpointInfo:
        """What a checkpoint after `iteration` steps says of itself."""
        before = self.start.checkpoint.info
        return CheckpointInfo(
            stage="trained",
            source=before.source,
            pattern=self.start.arguments.pattern if self.start.arguments.chooses_masks else before.pattern,
            method=before.method,
            details={
                "iteration": iteration,
                "settings": settings_of(self.start.arguments),
                "data": self.start.data,
                **self.start.details,
            },
        )

    def _sharded(self, optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
        # "fully_reshardable" is the only kind of distributed-optimizer state that any other layout can load. Gathering it over gloo on
        # one rank needs no room on the device.
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model_state = self.model.sharded_state_dict(metadata=metadata)
        return {
            "model": model_state,
            "optimizer": optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata),
        }


def _build(config: ModelConfig, arguments: TrainArguments, *, recomputation: dict[str, Any] | None = None) -> MaskedGPTModel:
    """This rank's part of a model that computes as the run does."""
    return build_model(
        config,
        params_dtype=arguments.dtype,
        sequence_parallel=arguments.sequence_parallel,
        transformer_impl=resolve_transformer_impl(arguments.transformer_impl),
        recomputation=recomputation,
    )


def _make_room(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the moments that it would make in its first step.

    Megatron's distributed optimizer cannot describe what to load without them (with Transformer Engine's and Apex's Adam it can).
    """
    one = unchained(optimizer)
    if isinstance(one, DistributedOptimizer) and isinstance(one.optimizer, torch.optim.Adam):
        for parameter in (parameter for group in one.optimizer.param_groups for parameter in group["params"]):
            one.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _load_originals(checkpoint: Checkpoint, model: MaskedGPTModel) -> dict[str, torch.Tensor]:
    """The model's tensors but logits that the checkpoint stores in another type than the model's, in that type.

    Logits are the run's own, in `--mask-logits-dtype`, also if those that it starts from have another.
    """
    wanted = {}
    for name, sharded in model.sharded_state_dict().items():
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory) and not name.endswith(f".{MASK_LOGITS}"):
            stored = checkpoint.tensors[sharded.key].dtype
            if sharded.data.dtype != stored:
                wanted[name] = _with_data(sharded, torch.empty_like(sharded.data, dtype=stored, device="cpu"))
    # Loading is collective, and another pipeline stage may have such tensors if this one has none.
    (wanted_by_any,) = any_rank(bool(wanted))
    return checkpoint.load({"model": wanted}).get("model", {}) if wanted_by_any else {}


def _with_data(sharded: ShardedTensor | ShardedTensorFactory, data: torch.Tensor) -> ShardedTensor | ShardedTensorFactory:
    """The same place in the checkpoint for another tensor of the same shape."""
    if isinstance(sharded, ShardedTensorFactory):
        return dataclasses.replace(sharded, data=data)
    return dataclasses.replace(sharded, data=data, dtype=data.dtype)


def _check_dense(model: MaskedGPTModel, what: str) -> None:
    """Raise MaskLLMError, which begins with `what`, on all ranks if a tenth of some rank's linear weights in the layers are zero.

    A checkpoint that was converted from a sparse Hugging Face model says nothing of its zeros.
    """
    with raised_together():
        weights = [layer.weight for layer in masked_linears(model)]
        share = sum(int((weight == 0).sum()) for weight in weights) / max(1, sum(weight.numel() for weight in weights))
        if share > 0.1:
            raise MaskLLMError(f"{what} {share:.0%} of these are zero; name the dense checkpoint")
