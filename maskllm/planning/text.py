"""A plan as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from maskllm.planning.cost import BANDWIDTH_EFFICIENCY, FLOPS_EFFICIENCY, GPUS, checkpoint_bytes
from maskllm.planning.models import StoredModel
from maskllm.planning.plan import Option, Plan
from maskllm.training.arguments import TrainArguments

COMPONENTS = {
    "weights": "weights, frozen",
    "teacher": "the teacher's weights, frozen",
    "mask_bits": "prior mask and last winners, as bits",
    "mask_logits": "mask logits",
    "gradients": "gradients",
    "masters": "fp32 masters of the trained weights",
    "optimizer_state": "optimizer state",
    "activations": "activations kept for the backward pass",
    "masked_weights": "masked weights kept for the backward pass",
    "communication": "communication buffers",
    "temporary": "temporary peak (a layer's backward pass, the loss's logits or the optimizer's step)",
}
"""Descriptions of the fields of `planning.memory.Memory`."""
IN_SOME_RUNS = ("teacher", "mask_logits", "masters")
"""Fields that the text leaves out if they are 0."""

LAYOUTS_SHOWN = 8
"""The number of layouts that the text lists."""


def plan_lines(plan: Plan, model: StoredModel, name: str, gpu: str | None) -> Iterator[str]:
    """The lines of a plan for `gpu`, one of GPUS, or for a CPU (None). GB are 10^9 bytes."""
    asked = plan.asked
    layout = asked.layout
    sizes = asked.arguments
    yield (
        f"{name}: {layout.ranks} ranks, {_layout(asked)}; {sizes.global_batch_size} sequences of {sizes.seq_length} tokens a step, "
        f"{sizes.micro_batch_size} a micro-batch"
    )
    yield ""
    for field, words in (COMPONENTS | _words_of_trained(asked.arguments)).items():
        if getattr(asked.memory, field) or field not in IN_SOME_RUNS:
            yield f"  {_gb(getattr(asked.memory, field))}  {words}"
    if gpu is not None:
        yield f"  {_gb(asked.outside)}  CUDA context and NCCL (assumed)"
    verdict = f"{'fits' if plan.fits else 'DOES NOT FIT'} in {plan.gpu_bytes / 1e9:.4g} GB"
    if gpu is not None and plan.gpu_bytes != GPUS[gpu].memory:
        verdict += f", the given --gpu-memory ({gpu} has {GPUS[gpu].memory / 1e9:g} GB)"
    yield f"  {_gb(asked.bytes)}  per rank of the largest pipeline stage; {verdict}"
    yield ""
    cost = asked.cost
    traffic = "masks and optimizer" if sizes.train == "masks" else "masks, gradients and optimizer"
    yield (
        f"step: {cost.flops / 1e15:.3g} PFLOP in total; per rank {cost.memory_traffic / 1e9:.3g} GB of memory traffic for {traffic}, "
        f"{cost.link_traffic / 1e9:.3g} GB over its links"
    )
    if cost.seconds is not None:
        yield (
            f"      {cost.seconds:.3g} s on {gpu}, {cost.tokens / cost.seconds:.3g} tokens/s (assuming {FLOPS_EFFICIENCY:.0%} "
            f"of its peak FLOP/s and {BANDWIDTH_EFFICIENCY:.0%} of its bandwidths)"
        )
    yield f"checkpoint: {checkpoint_bytes(model, asked.arguments) / 1e9:.3g} GB on disk"
    if plan.leanest is not None:
        yield f"without any change of the results, {plan.leanest.bytes / 1e9:.1f} GB: {plan.leanest.settings()}"
    if plan.remedy is not None:
        yield f"to make this layout fit, {plan.remedy.bytes / 1e9:.1f} GB: {plan.remedy.settings()}"
        yield from (f"  {line}" for line in _precision_notes(plan.remedy, asked))
    elif not plan.fits:
        yield "no setting makes this layout fit; use more ranks, shorter sequences or smaller micro-batches"
    yield ""
    if plan.layouts:
        order = "smallest" if gpu is None else "fastest"
        yield f"layouts of {layout.ranks} ranks that fit with the given settings, the {order} first:"
        for one in plan.layouts[:LAYOUTS_SHOWN]:
            seconds = "" if one.cost.seconds is None else f"{one.cost.seconds:8.3g} s/step  "
            yield f"  {_gb(one.bytes)}  {seconds}{_layout(one)}"
        if len(plan.layouts) > LAYOUTS_SHOWN:
            yield f"  and {len(plan.layouts) - LAYOUTS_SHOWN} more"
    else:
        yield f"no layout of {layout.ranks} ranks fits with the given settings"


def _words_of_trained(arguments: TrainArguments) -> dict[str, str]:
    """The words of COMPONENTS that other things than masks change."""
    if not arguments.trains_weights:
        return {}
    words = {"weights": "weights, all trained" if arguments.train_embeddings else "weights, those of the layers trained"}
    if arguments.uses_cast:
        words["mask_bits"] = "mask by magnitude and that of a validation, as bits"
        words["masked_weights"] = "weights times their scales kept for the backward pass"
    elif not arguments.trains_masks:
        words["mask_bits"] = "fixed mask, as bits"
    return words


def _precision_notes(option: Option, asked: Option) -> Iterator[str]:
    """What the option's dtypes change in the training, compared with those requested."""
    arguments = option.arguments
    if arguments.mask_logits_dtype != asked.arguments.mask_logits_dtype == "fp32":
        micro_batches = arguments.num_microbatches(option.layout.data)
        added = f", and the gradients of a step's {micro_batches} micro-batches are summed in bf16" if micro_batches > 1 else ""
        yield f"bf16 logits change what is learned: each step rounds them stochastically{added} (docs/memory.md, Low precision)"
    if arguments.optimizer_state_dtype != asked.arguments.optimizer_state_dtype and arguments.optimizer_state_dtype != "fp32":
        dtype = arguments.optimizer_state_dtype
        yield f"{dtype} moments change what is learned: each step rounds Adam's moments to {dtype} (docs/memory.md, Low precision)"


def _layout(option: Option) -> str:
    layout = option.layout
    return f"tensor parallel {layout.tensor}, pipeline parallel {layout.pipeline}, data parallel {layout.data}"


def _gb(size: float) -> str:
    return f"{size / 1e9:8.2f} GB"
