"""Where a run starts from, and what it writes to go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from maskllm.checkpoints.checksums import FileRecord
from maskllm.checkpoints.reading import Checkpoint, CheckpointInfo, holds_checkpoint, iterations, open_iteration
from maskllm.distributed import any_rank, from_first_rank, is_first_rank, raised_together
from maskllm.environment.optional_parts import resolve_transformer_impl
from maskllm.errors import MaskLLMError
from maskllm.families.model_config import ModelConfig
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model, load_model, load_tensors
from maskllm.megatron.gpt import FrozenVocabularyGPTModel
from maskllm.megatron.spec import masked_linears
from maskllm.patterns import Pattern
from maskllm.training.arguments import DTYPES, TrainArguments
from maskllm.training.optimizer import fit_adam_state

SETTINGS_THAT_MUST_MATCH = (
    "pattern",
    "seed",
    "train_iters",
    "global_batch_size",
    "micro_batch_size",
    "seq_length",
    "hard",
    "prior_strength",
    "mask_sample_interval",
    "gumbel_temperature_range",
    "gumbel_scale_range",
    "weight_reg",
    "use_distributed_optimizer",
    "mask_logits_dtype",
    "optimizer_state_dtype",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "clip_grad",
    "split",
)
"""Arguments that a resumed run must share with the run it continues, as it must its data: all that decide what is learned. The rest
(layout, precision of the frozen weights, intervals, paths) may change. The two kinds of optimizer keep their state under different keys
and cannot load each other's."""


@dataclass
class Start:
    """The checkpoint a run starts from."""

    arguments: TrainArguments
    checkpoint: Checkpoint
    resumed: bool
    """Whether it was written by training and is continued, rather than started from."""
    data: list[dict[str, Any]]
    """What identifies the run's data: see `data_identity`."""
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    """This rank's frozen tensors, by their name in the model, as the checkpoint stores them, on the host: those whose type is not the
    one that training computes in. They are what a checkpoint of this run holds, so that weights leave it bit-identical."""

    @property
    def iteration(self) -> int:
        """Steps already done."""
        return int(self.checkpoint.iteration) if self.resumed else 0

    @property
    def lies_in_save(self) -> bool:
        """Whether the checkpoint is one of those in `--save`, there or by a link."""
        save, path = self.arguments.save, self.checkpoint.path
        return save is not None and Path(save).resolve() in (path.parent.resolve(), path.resolve().parent)

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        return self.checkpoint.model_config

    def build_model(self, sampler: MaskSampler) -> FrozenVocabularyGPTModel:
        """This rank's part of the model, weights and prior loaded, with learnable logits.

        A new run's logits are drawn, and moved toward the prior if there is one; a resumed run's are loaded by `load_training_state`.
        """
        arguments = self.arguments
        model = build_model(
            self.model_config,
            params_dtype=arguments.dtype,
            sequence_parallel=arguments.sequence_parallel,
            transformer_impl=resolve_transformer_impl(arguments.transformer_impl),
            recomputation=arguments.recomputation(),
        )
        layers = list(masked_linears(model))
        has_prior = self.checkpoint.info.method is not None
        if has_prior:
            for layer in layers:
                layer.attach_bits()
        load_model(self.checkpoint, model)
        self.originals = _load_originals(self.checkpoint, model)
        for layer in layers:
            layer.attach_logits(
                sampler,
                draw=not self.resumed,
                prior_strength=arguments.prior_strength if has_prior else None,
                dtype=DTYPES[arguments.mask_logits_dtype],
            )
        return model


def resolve_start(arguments: TrainArguments, pattern: Pattern, *, say: Callable[[str], None] = lambda _: None) -> Start:
    """Open `--load` or, while that directory holds no checkpoint yet, `--pretrained-checkpoint`, and verify its files' checksums.

    Called by all ranks of the job, if there is one; `say` gets a line about each checkpoint that is passed over. Raises MaskLLMError
    where a file is damaged and there is no `--auto-fallback`, or nothing older to fall back to; where the checkpoint's pattern or a
    setting of the run it continues contradicts the arguments; and where sequences are longer than the model's context.
    """
    path = arguments.load
    if arguments.pretrained_checkpoint is not None and (path is None or not from_first_rank(holds_checkpoint(path))):
        path = arguments.pretrained_checkpoint
    checkpoint = _open_intact(path, fall_back=arguments.auto_fallback, say=say)
    info = checkpoint.info
    context = checkpoint.model_config.max_position_embeddings
    if arguments.seq_length > context:
        raise MaskLLMError(f"--seq-length {arguments.seq_length}: the model in {checkpoint.path} has a context of {context} tokens")
    if info.stage == "trimmed":
        raise MaskLLMError(
            f"{checkpoint.path}: a trimmed checkpoint's weights have their zeros written in; start from the pruned one"
        )
    if info.stage == "pruned" and info.details.get("update_weights"):
        raise MaskLLMError(
            f"{checkpoint.path}: its weights have zeros written in (--update-weights), which no mask can bring back; start from one "
            "pruned without it"
        )
    if info.pattern is not None and info.pattern != str(pattern):
        raise MaskLLMError(f"{checkpoint.path}: its masks have pattern {info.pattern}; --pattern is {pattern}")
    resumed = info.stage == "trained"
    data: list[dict[str, Any]] = []
    with raised_together():
        if is_first_rank():
            data = data_identity(arguments)
    data = from_first_rank(data)
    if resumed:
        before = info.details.get("settings")
        if not isinstance(before, dict) or not before.keys() >= set(SETTINGS_THAT_MUST_MATCH):
            raise MaskLLMError(f"{checkpoint.path}: its maskllm.json lacks the settings of the run; it cannot be resumed")
        for name, now in _settings(arguments).items():
            if before[name] != now:
                raise MaskLLMError(
                    f"--{name.replace('_', '-')} {now}: the run in {checkpoint.path} has {before[name]}; resume with the same value, or "
                    "start a new run with another --load and --save"
                )
        if info.details.get("data") != data:
            raise MaskLLMError(
                f"--data-path: these are not the data of the run in {checkpoint.path} (its datasets, in their order, with their "
                "weights, wherever they lie); resume with the same data, or start a new run with another --load and --save"
            )
    start = Start(arguments, checkpoint, resumed, data)
    if arguments.save is not None and from_first_rank(holds_checkpoint(arguments.save) and not (resumed and start.lies_in_save)):
        if start.lies_in_save:
            raise MaskLLMError(f"--save {arguments.save}: holds the checkpoint that the run starts from; name another --save")
        raise MaskLLMError(
            f"--save {arguments.save}: holds a run; go on with it by --load {arguments.save}, or name another --save"
        )
    return start


def _open_intact(path: str, *, fall_back: bool, say: Callable[[str], None]) -> Checkpoint:
    """The first of `iterations(path)`, its checksums verified; with `fall_back` the first that is intact."""
    found: list[str] = []
    with raised_together():  # the first rank decides: another machine may not see the newest directory yet
        if is_first_rank():
            found = [str(candidate) for candidate in iterations(path, fall_back=fall_back, say=say)]
    candidates = [Path(candidate) for candidate in from_first_rank(found)]
    for candidate, older in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            with raised_together():
                checkpoint = open_iteration(candidate)
            checkpoint.verify()
            return checkpoint
        except MaskLLMError as error:
            if older is None:
                raise
            if not fall_back:
                raise MaskLLMError(f"{error} (--auto-fallback goes on from {older.name})") from None
            say(f"{error}; --auto-fallback: going on from {older.name}")
    raise AssertionError("iterations() gives at least one")


def sharded_training_state(start: Start, model: FrozenVocabularyGPTModel, optimizer: MegatronOptimizer) -> dict[str, Any]:
    """This rank's part of everything that the next step depends on, for `CheckpointSaver.save`."""
    state = _sharded_state(model, optimizer, is_loading=False)
    for name, tensor in start.originals.items():
        state["model"][name] = _with_data(state["model"][name], tensor)
    return state


def training_info(start: Start, arguments: TrainArguments, iteration: int) -> CheckpointInfo:
    """What a checkpoint after `iteration` steps says of itself."""
    info = start.checkpoint.info
    return CheckpointInfo(
        stage="trained",
        source=info.source,
        pattern=arguments.pattern,
        method=info.method,
        details={"iteration": iteration, "settings": _settings(arguments), "data": start.data},
    )


def load_training_state(start: Start, model: FrozenVocabularyGPTModel, optimizer: MegatronOptimizer) -> None:
    """Read logits and optimizer state back, under any layout."""
    _make_room(optimizer)
    state = start.checkpoint.load(_sharded_state(model, optimizer, is_loading=True))
    load_tensors(model, state["model"])
    fit_adam_state(state["optimizer"], optimizer)
    optimizer.load_state_dict(state["optimizer"])


def _make_room(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam the moments that it would make in its first step: Megatron's distributed optimizer cannot describe what it is to
    load without them (it can for Transformer Engine's and Apex's)."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(one, DistributedOptimizer) and isinstance(one.optimizer, torch.optim.Adam):
            for parameter in (parameter for group in one.optimizer.param_groups for parameter in group["params"]):
                one.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _sharded_state(model: FrozenVocabularyGPTModel, optimizer: MegatronOptimizer, *, is_loading: bool) -> dict[str, Any]:
    # "fully_reshardable" is the distributed optimizer's only kind of state that any other layout can load; gathering it over gloo on
    # one rank needs no room on the device.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model_state = model.sharded_state_dict(metadata=metadata)
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata),
    }


def _load_originals(checkpoint: Checkpoint, model: FrozenVocabularyGPTModel) -> dict[str, torch.Tensor]:
    """The model's tensors that the checkpoint stores in another type than the model's, in that type."""
    wanted = {}
    for name, sharded in model.sharded_state_dict().items():
        if isinstance(sharded, ShardedTensor | ShardedTensorFactory):
            stored = checkpoint.tensors[sharded.key].dtype
            if sharded.data.dtype != stored:
                wanted[name] = _with_data(sharded, torch.empty_like(sharded.data, dtype=stored, device="cpu"))
    # Loading is collective, and another pipeline stage may have such tensors where this one has none.
    (wanted_by_any,) = any_rank(bool(wanted))
    return checkpoint.load({"model": wanted}).get("model", {}) if wanted_by_any else {}


def _with_data(sharded: ShardedTensor | ShardedTensorFactory, data: torch.Tensor) -> ShardedTensor | ShardedTensorFactory:
    """The same place in the checkpoint for another tensor of the same shape."""
    if isinstance(sharded, ShardedTensorFactory):
        return dataclasses.replace(sharded, data=data)
    return dataclasses.replace(sharded, data=data, dtype=data.dtype)


def data_identity(arguments: TrainArguments) -> list[dict[str, Any]]:
    """Of each dataset of the blend its weight and the checksum of its index, which has every document's length: its path may change."""
    prefixes, weights = arguments.blend()
    return [
        {"weight": weight, "idx": asdict(FileRecord.of(Path(f"{prefix}.idx")))}
        for prefix, weight in zip(prefixes, weights or [1.0], strict=True)
    ]


def _settings(arguments: TrainArguments) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in SETTINGS_THAT_MUST_MATCH}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
