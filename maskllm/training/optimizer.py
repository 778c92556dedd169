"""The optimizer of everything that is trained and its learning-rate schedule, on Megatron's wrappers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from maskllm.errors import MaskLLMError
from maskllm.masking.adam_s import AdamS
from maskllm.masking.parameter import MaskedParameter
from maskllm.ops import philox_key
from maskllm.training.arguments import TrainArguments
from maskllm.training.logits_adam import LogitsAdam, Place
from maskllm.training.trainables import MASK_LOGITS, WEIGHT_SCALES, ParameterGroup


def build_optimizer(
    arguments: TrainArguments,
    groups: Sequence[ParameterGroup],
    masked: Sequence[MaskedParameter],
    model: DistributedDataParallel,
) -> MegatronOptimizer:
    """Build the optimizer of `groups`, which hold all trained parameters of `model`.

    Parameters in bf16 have fp32 masters (Megatron's mixed-precision optimizer). Returns Megatron's optimizer if logits and moments are
    all fp32, and `LogitsOptimizer` otherwise. `masked` are the masked weights that own the logits or weights among the parameters.
    With `--weights-optimizer cast` Megatron's optimizer has `AdamS` inside. Raises MaskLLMError if that cannot be.
    """
    first = groups[0]
    config = OptimizerConfig(
        optimizer="adam",
        lr=first.lr,
        min_lr=first.min_lr,
        weight_decay=first.weight_decay,
        adam_beta1=arguments.adam_beta1,
        adam_beta2=arguments.adam_beta2,
        adam_eps=arguments.adam_eps,
        clip_grad=arguments.clip_grad,
        use_distributed_optimizer=arguments.use_distributed_optimizer,
        # Logits need no master copy in another dtype, so Megatron builds a plain fp32 optimizer even if the logits are bf16.
        bf16=arguments.trains_weights and arguments.params_dtype == "bf16",
        params_dtype=arguments.dtype if arguments.trains_weights else torch.float32,
    )
    optimizer = get_megatron_optimizer(config, [model], config_overrides=_overrides(groups))
    if arguments.optimizer_state_dtype != "fp32" or any(group.master_dtype != torch.float32 for group in groups):
        places = {
            parameter.logits: Place(philox_key(arguments.seed, f"{parameter.location.name}.rounding"), parameter.shard)
            for parameter in masked
        }
        own = [dict(group) for group in optimizer.param_groups]
        return LogitsOptimizer(LogitsAdam(own, state_dtype=arguments.optimizer_state_dtype, places=places), config)
    for group in optimizer.param_groups:
        if "fused" in group:  # torch's AdamW: unless fused, it needs GPU memory for copies of all its parameters
            group["fused"] = True
    if arguments.uses_cast:
        _use_adam_s(optimizer, masked, arguments.l1_decay_coeff)
    return optimizer


def clip_and_step(optimizer: MegatronOptimizer, groups: Sequence[ParameterGroup]) -> list[float]:
    """Clip the gradients and update the parameters of `groups`. Returns the norms before clipping, the logits' first.

    If weights are trained beside the logits, these are clipped apart from them. At low temperatures the norm of the logits' gradient is
    10 to 30 times that of the weights', and differs as much from step to step. One norm over both would shrink the weights' gradients to
    the size of Adam's epsilon. All groups but the logits share one norm.
    """
    if len(groups) == 1 or groups[0].name != MASK_LOGITS:
        _, norm, _ = optimizer.step()
        return [float(norm)]
    # As `MegatronOptimizer.step`, which has one norm.
    one = unchained(optimizer)
    one.prepare_grads()
    counted = {id(gradient) for gradient in one.get_main_grads_for_grad_norm()}
    logits, *others = (group["params"] for group in one.optimizer.param_groups)
    norms = []
    for parameters in (logits, [parameter for group in others for parameter in group]):
        gradients = [parameter.grad for parameter in parameters if id(parameter.grad) in counted]
        norm = float(clip_grads.get_grad_norm_fp32(gradients, grad_stats_parallel_group=one.get_grad_stats_parallel_group()))
        if one.config.clip_grad > 0:
            clip_grads.clip_grad_by_total_norm_fp32(parameters, one.config.clip_grad, norm)
        norms.append(norm)
    one.step_with_ready_grads()
    return norms


def unchained(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """The one optimizer in a chain of Megatron's (`ChainedOptimizer`), or `optimizer` itself."""
    (one,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return one


def _use_adam_s(optimizer: MegatronOptimizer, masked: Sequence[MaskedParameter], decay: float) -> None:
    """Put `AdamS` in the place of the Adam that Megatron has chosen, over the same groups."""
    one = unchained(optimizer)
    if isinstance(one, DistributedOptimizer) and not isinstance(one.optimizer, torch.optim.Adam):
        # It counts the steps where the Adam that it was made for does, and a checkpoint would lose those of another.
        raise MaskLLMError(
            "--weights-optimizer cast: Megatron's distributed optimizer needs torch's Adam for it, and takes that of Transformer Engine or "
            "Apex, which is installed; leave out --use-distributed-optimizer"
        )
    kept = {}
    for parameter in masked:
        here = slice(None)
        if isinstance(one, DistributedOptimizer):
            place = one.model_param_group_index_map.get(parameter.weight)
            if place is None:
                continue  # other data-parallel ranks hold all of it
            master = one.param_groups[place[0]]["params"][place[1]]
            entries = one._get_model_param_range_map(parameter.weight)["param"]
            here = slice(entries.start, entries.end)
        else:
            master = getattr(parameter.weight, "main_param", parameter.weight)
        kept[master] = functools.partial(_kept, parameter, here)
    one.optimizer = AdamS(one.optimizer.param_groups, kept, decay)


def _kept(parameter: MaskedParameter, entries: slice) -> torch.Tensor:
    """The mask of these entries of the flattened weight."""
    return parameter.fixed_mask().view(-1)[entries]


def _overrides(groups: Sequence[ParameterGroup]) -> dict[ParamKey, dict[str, Any]]:
    """Return the rates of all groups but that of the logits, in the form of Megatron's `config_overrides`.

    Megatron tells the groups of a checkpoint apart by `wd_mult` and `is_decoupled_lr` alone, and sorts them by these settings.
    """
    overrides = {}
    for group in groups:
        if group.name != MASK_LOGITS:
            key = ParamKey(predicate=ParamPredicate(group.name, set(group.parameters).__contains__))
            overrides[key] = {
                "max_lr": group.lr,
                "min_lr": group.min_lr,
                "start_wd": group.weight_decay,
                "end_wd": group.weight_decay,
                "wd_mult": 1.0 if group.weight_decay else 0.0,
                "is_decoupled_lr": group.name != WEIGHT_SCALES,
            }
    return overrides


def fit_adam_state(state: dict[str, Any], optimizer: MegatronOptimizer) -> None:
    """Convert a loaded optimizer state, in place, to the form that this installation's Adam expects, whichever Adam saved it.

    Megatron uses the first installed of Transformer Engine's, Apex's and torch's Adam. torch's Adam counts the steps of each
    parameter, and Megatron saves that count once, as `common_step`. The other two count the steps of each group. The options in the
    groups differ between all three.
    """
    one = unchained(optimizer)
    if isinstance(one, LogitsOptimizer):
        return
    adam = one.optimizer
    own = {name: value for name, value in adam.param_groups[0].items() if name not in ("params", "step")}
    rates = ("start_wd", "end_wd")  # of the scheduler, in some groups only
    # The distributed optimizer loads the parameters' state separately, and it always counts the steps of each group.
    adam_state = state.get("optimizer", state)  # inside of the states of the mixed-precision and the distributed optimizer
    parameters = adam_state.get("state", {})
    steps_of_groups = not (parameters and isinstance(adam, torch.optim.Adam))
    for group in adam_state["param_groups"]:
        steps = int(parameters.get("common_step", group.get("step")))
        fitted = {name: group.get(name, value) for name, value in own.items()}
        fitted |= {name: group[name] for name in rates if name in group}
        if steps_of_groups:
            fitted["step"] = steps
        else:
            parameters["common_step"] = torch.tensor(float(steps))
        if "params" in group:
            fitted["params"] = group["params"]
        group.clear()
        group.update(fitted)
    if steps_of_groups:
        parameters.pop("common_step", None)


def build_lr_scheduler(arguments: TrainArguments, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build the learning-rate schedule. Like Megatron's, it counts sequences, not iterations."""
    batch = arguments.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=arguments.lr,
        min_lr=arguments.min_lr,
        lr_warmup_steps=arguments.lr_warmup_iters * batch,
        lr_decay_steps=arguments.train_iters * batch,
        lr_decay_style=arguments.lr_decay_style,
        start_wd=arguments.weight_decay,
        end_wd=arguments.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


class LogitsOptimizer(FP32Optimizer):
    """`FP32Optimizer` around `LogitsAdam`. Gradients may have any float dtype. Checkpoints use Megatron's usual keys for the moments."""

    def __init__(self, optimizer: LogitsAdam, config: OptimizerConfig) -> None:
        super().__init__(optimizer, config, init_state_fn=lambda *_: None)
        self.tp_group = parallel_state.get_tensor_model_parallel_group()

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """Return the norm of the gradients of all ranks, summed in fp32. Upstream sums in the gradients' dtype.

        Each gradient counts once, because no two ranks hold the same logits.
        """
        squares = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square() for parameter in self.get_parameters()]
        total = torch.stack(squares).sum()
        dist.all_reduce(total, group=self.get_grad_stats_parallel_group())
        return float(total.sqrt())

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:
        """Update the parameters. Returns (True, the gradients' norm before clipping, None).

        Upstream's clipping scales the gradients in place, which would round bf16 gradients once more. `LogitsAdam` scales them in
        fp32 instead.
        """
        self.prepare_grads()
        norm = self.get_grad_norm()
        largest = self.config.clip_grad
        self.optimizer.grad_scale = min(1.0, largest / (norm + 1e-6)) if largest > 0 else 1.0
        return self.step_with_ready_grads(), norm, None

    def sharded_state_dict(
        self, model_sharded_state_dict: ShardedStateDict, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the moments, sharded like their parameters, and the number of steps."""
        places = get_param_id_to_sharded_param_map(model_sharded_state_dict, self.get_parameters())
        state: dict[int, Any] = {}
        for index, parameter in enumerate(self.get_parameters()):
            state[index] = {
                name: make_sharded_optimizer_tensor(
                    places[index], moment.stored().view(parameter.shape), prefix=f"optimizer.state.{name}"
                )
                for name, moment in self.optimizer.state[parameter].items()
            }
        return {"state": state, "steps": self.optimizer.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the moments and the number of steps that `sharded_state_dict` described, loaded under this parallel layout."""
        self.optimizer.steps = state_dict["steps"]
        for index, parameter in enumerate(self.get_parameters()):
            for name, moment in self.optimizer.state[parameter].items():
                moment.restore(state_dict["state"][index][name].view(-1))
