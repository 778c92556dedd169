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
from maskllm.distributed import any_rank
from maskllm.environment.optional_parts import resolve_transformer_impl
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model
from maskllm.megatron.gpt import FrozenVocabularyGPTModel
from maskllm.megatron.linears import attach_bits, attach_logits, masked_parameters
from maskllm.training.optimizer import fit_adam_state
from maskllm.training.start import Start, settings_of


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """This rank's part of everything that the next step depends on."""

    start: Start
    model: FrozenVocabularyGPTModel
    originals: dict[str, torch.Tensor]
    """The frozen tensors that the checkpoint stores in another type than training computes in: in that type, on the host, by name.

    Checkpoints of this run hold them instead of the model's, so that weights leave training bit-identical.
    """

    @classmethod
    def load(cls, start: Start, sampler: MaskSampler) -> TrainingState:
        """Build the model with weights and prior loaded, and with learnable logits.

        A new run's logits are drawn and, if there is a prior, moved toward it; `load_optimizer` loads those of a resumed run.
        """
        arguments = start.arguments
        model = build_model(
            start.model_config,
            params_dtype=arguments.dtype,
            sequence_parallel=arguments.sequence_parallel,
            transformer_impl=resolve_transformer_impl(arguments.transformer_impl),
            recomputation=arguments.recomputation(),
        )
        has_prior = start.checkpoint.info.has_prior
        if has_prior:
            attach_bits(model)
        load_model(start.checkpoint, model)
        originals = _load_originals(start.checkpoint, model)
        attach_logits(model, sampler, dtype=arguments.logits_dtype)
        if not start.resumed:
            for parameter in masked_parameters(model):
                parameter.reset(arguments.prior_strength if has_prior else None)
        return cls(start, model, originals)

    def load_optimizer(self, optimizer: MegatronOptimizer) -> None:
        """Read the logits and the optimizer's state of a resumed run, under any layout."""
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
            pattern=self.start.arguments.pattern,
            method=before.method,
            details={"iteration": iteration, "settings": settings_of(self.start.arguments), "data": self.start.data},
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


def _make_room(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the moments that it would make in its first step.

    Megatron's distributed optimizer cannot describe what to load without them (with Transformer Engine's and Apex's Adam it can).
    """
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one, DistributedOptimizer) and isinstance(one.optimizer, torch.optim.Adam):
            for parameter in (parameter for group in one.optimizer.param_groups for parameter in group["params"]):
                one.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _load_originals(checkpoint: Checkpoint, model: FrozenVocabularyGPTModel) -> dict[str, torch.Tensor]:
    """The model's tensors that the checkpoint stores in another type than the model's, in that type."""
    wanted = {}
    for name, sharded in model.sharded_state_dict().items():
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory):
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
