"""A plan: what the requested layout needs, which settings make it fit, and which other layouts fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maskllm.errors import MaskLLMError, flag
from maskllm.families.linears import LINEARS
from maskllm.families.model_config import check_context
from maskllm.megatron.build import check_recomputation
from maskllm.patterns import Pattern
from maskllm.planning.cost import Cluster, Cost, checkpoint_bytes, step_cost
from maskllm.planning.memory import Layout, Memory, largest_stage
from maskllm.planning.models import StoredModel
from maskllm.training.arguments import TrainArguments

CUDA_CONTEXT = 0.6e9
"""About the bytes of a GPU's memory that CUDA and its libraries take before the first tensor."""
NCCL_COMMUNICATOR = 0.3e9
"""About the bytes that NCCL takes for each group of ranks."""

SAVERS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute_granularity": "selective", "recompute_modules": ["masked_weight"]},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp", "masked_weight"]},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
"""Settings that keep less for the backward pass, the cheapest first."""
PRECISIONS = (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "8bit"), ("bf16", "bf16"), ("bf16", "8bit"))
"""Dtypes of logits and of Adam's moments, the most exact first."""


@dataclass(frozen=True)
class Option:
    """One way to run the training, with its memory and cost."""

    arguments: TrainArguments
    layout: Layout
    memory: Memory
    outside: float
    """Assumed bytes outside torch's allocator: the CUDA context and NCCL's communicators."""
    cost: Cost

    @property
    def bytes(self) -> float:
        """All bytes that a GPU must hold."""
        return self.memory.total + self.outside

    def settings(self) -> str:
        """The command-line flags in which options of a plan may differ."""
        arguments = self.arguments
        flags = [
            f"--tensor-model-parallel-size {self.layout.tensor}",
            f"--pipeline-model-parallel-size {self.layout.pipeline}",
        ]
        for name in ("mask_logits_dtype", "optimizer_state_dtype"):
            if getattr(arguments, name) != "fp32":
                flags.append(f"{flag(name)} {getattr(arguments, name)}")
        for name in ("sequence_parallel", "use_distributed_optimizer"):
            if getattr(arguments, name):
                flags.append(flag(name))
        if arguments.recompute_granularity == "full":
            flags.append(
                f"--recompute-granularity full --recompute-method {arguments.recompute_method} "
                f"--recompute-num-layers {arguments.recompute_num_layers}"
            )
        elif arguments.recompute_granularity == "selective":
            flags.append(f"--recompute-granularity selective --recompute-modules {' '.join(arguments.recompute_modules)}")
        return " ".join(flags)


def option(model: StoredModel, arguments: TrainArguments, ranks: int, *, cluster: Cluster | None) -> Option:
    """The memory and cost of a run on `ranks` GPUs of `cluster`, or on `ranks` CPU processes (None).

    Raises MaskLLMError if training would refuse the sizes: ranks, batch, pattern or recomputed layers do not divide, or the
    sequences are longer than the model's context.
    """
    tensor, pipeline = arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size
    if ranks % (tensor * pipeline):
        raise MaskLLMError(
            f"--num-gpus {ranks}: wanted a multiple of --tensor-model-parallel-size {tensor} x "
            f"--pipeline-model-parallel-size {pipeline}"
        )
    layout = Layout(tensor, pipeline, ranks // (tensor * pipeline))
    arguments.check_settings()
    model.check_tensor_parallel(tensor)
    if model.num_layers % pipeline:
        raise MaskLLMError(f"--pipeline-model-parallel-size {pipeline}: wanted a divisor of the model's {model.num_layers} layers")
    check_recomputation(arguments.recomputation(), model.num_layers // pipeline)
    _check_pattern(model, arguments, tensor)
    arguments.num_microbatches(layout.data)
    memory = largest_stage(model, arguments, layout, device="cpu" if cluster is None else "cuda")
    check_context(arguments.seq_length, model.context)
    groups = (tensor > 1) + (pipeline > 1) + (layout.data > 1)
    outside = CUDA_CONTEXT + groups * NCCL_COMMUNICATOR if cluster is not None else 0.0
    return Option(arguments, layout, memory, outside, step_cost(model, arguments, layout, cluster))


def layouts_that_fit(
    model: StoredModel, arguments: TrainArguments, ranks: int, gpu_bytes: float, *, cluster: Cluster | None
) -> list[Option]:
    """All layouts of `ranks` ranks that fit with the given settings, the fastest first; on CPUs the smallest first."""
    # Tensor parallelism splits the heads, pipeline parallelism the layers.
    sizes = itertools.product(range(1, model.num_attention_heads + 1), range(1, model.num_layers + 1))
    found = [
        one
        for tensor, pipeline in sizes
        if ranks % (tensor * pipeline) == 0
        for one in _possible(
            model,
            dataclasses.replace(arguments, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline),
            ranks,
            cluster,
        )
        if one.bytes <= gpu_bytes
    ]
    return sorted(found, key=lambda one: (one.cost.seconds or 0.0, one.bytes))


def settings_that_fit(
    model: StoredModel, arguments: TrainArguments, ranks: int, gpu_bytes: float, *, cluster: Cluster | None
) -> Option | None:
    """The first option of the same layout that fits: the most exact dtypes first, then the cheapest recomputation. Or None."""
    for logits, moments in PRECISIONS:
        changed = dataclasses.replace(arguments, mask_logits_dtype=logits, optimizer_state_dtype=moments)
        for one in _savings(model, changed, ranks, cluster):
            if one.bytes <= gpu_bytes:
                return one
    return None


def least_without_loss(model: StoredModel, arguments: TrainArguments, ranks: int, *, cluster: Cluster | None) -> Option | None:
    """The option with the least memory that does not change the results: same layout, same dtypes."""
    return min(_savings(model, arguments, ranks, cluster), key=lambda one: one.bytes, default=None)


def _savings(model: StoredModel, arguments: TrainArguments, ranks: int, cluster: Cluster | None) -> Iterator[Option]:
    """Options with the same results: activations and optimizer state split over the ranks, then more and more recomputation."""
    tensor = arguments.tensor_model_parallel_size
    data = ranks // (tensor * arguments.pipeline_model_parallel_size)
    # Megatron's distributed optimizer keeps fp32, and does not take CAST's optimizer where Transformer Engine or Apex brings Adam.
    can_split = not arguments.low_precision and not arguments.uses_cast
    for saver in SAVERS:
        reset = {
            "recompute_granularity": None,
            "recompute_method": None,
            "recompute_num_layers": None,
            "recompute_modules": ("core_attn",),
        }
        changed = dataclasses.replace(
            arguments,
            sequence_parallel=arguments.sequence_parallel or tensor > 1,
            use_distributed_optimizer=arguments.use_distributed_optimizer or (can_split and data > 1),
            **reset | saver,
        )
        yield from _possible(model, changed, ranks, cluster)


@dataclass(frozen=True)
class Plan:
    """The answer of `maskllm plan`."""

    asked: Option
    gpu_bytes: float
    layouts: list[Option]
    """The layouts that fit with the requested settings, the fastest first."""
    remedy: Option | None
    """The requested layout with settings that make it fit. None if it fits already, or if no settings do."""
    leanest: Option | None
    """The requested layout with the settings that save most memory and do not change the results. None if nothing saves memory."""

    @property
    def fits(self) -> bool:
        """Whether the requested run fits on a GPU."""
        return self.asked.bytes <= self.gpu_bytes

    def report(self, model: StoredModel) -> dict[str, Any]:
        """The numbers for `--json`, in bytes and seconds."""
        return {
            "asked": _numbers(self.asked, model),
            "gpu_bytes": self.gpu_bytes,
            "fits": self.fits,
            "layouts_that_fit": [_numbers(one, model) for one in self.layouts],
            "least_memory_without_loss": None if self.leanest is None else _numbers(self.leanest, model),
            "settings_that_fit": None if self.remedy is None else _numbers(self.remedy, model),
        }


def plan(
    model: StoredModel,
    arguments: TrainArguments,
    *,
    num_gpus: int,
    gpu_bytes: float,
    cluster: Cluster | None,
) -> Plan:
    """Plan a run on `num_gpus` GPUs of `cluster`, each with `gpu_bytes` bytes.

    Without a cluster, plan for CPU processes and count their memory beyond the imported libraries. Raises MaskLLMError if the
    layout is impossible (see `option`).
    """
    asked = option(model, arguments, num_gpus, cluster=cluster)
    remedy = None
    if asked.bytes > gpu_bytes:
        remedy = settings_that_fit(model, arguments, num_gpus, gpu_bytes, cluster=cluster)
    leanest = least_without_loss(model, arguments, num_gpus, cluster=cluster)
    if leanest is not None and leanest.bytes >= asked.bytes:
        leanest = None
    layouts = layouts_that_fit(model, arguments, num_gpus, gpu_bytes, cluster=cluster)
    return Plan(asked, gpu_bytes, layouts, remedy, leanest)


def _numbers(chosen: Option, model: StoredModel) -> dict[str, Any]:
    return {
        "layout": dataclasses.asdict(chosen.layout),
        "settings": chosen.settings(),
        "memory": {**vars(chosen.memory), "outside_torch": chosen.outside, "total": chosen.bytes},
        "step": dataclasses.asdict(chosen.cost),
        "checkpoint_bytes": checkpoint_bytes(model, chosen.arguments),
    }


def _possible(model: StoredModel, arguments: TrainArguments, ranks: int, cluster: Cluster | None) -> Iterator[Option]:
    try:
        yield option(model, arguments, ranks, cluster=cluster)
    except MaskLLMError:
        return


def _check_pattern(model: StoredModel, arguments: TrainArguments, tensor: int) -> None:
    """Raise MaskLLMError if a rank's part of a row does not consist of whole blocks."""
    pattern = Pattern.parse(arguments.pattern)
    for linear in LINEARS:
        pattern.check_divides(linear.shape(model, tensor)[1], linear.name)
