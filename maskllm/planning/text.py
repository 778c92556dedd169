"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from maskllm.models.config import ModelConfig
from maskllm.planning.cost import BANDWIDTH_EFFICIENCY, FLOPS_EFFICIENCY, checkpoint_bytes
from maskllm.planning.plan import Option, Plan

COMPONENTS = {
    "weights": "weights, frozen",
    "mask_bits": "prior mask and last winners, as bits",
    "mask_logits": "mask logits",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations kept for the backward pass",
    "masked_weights": "masked weights kept for the backward pass",
    "communication": "communication buffers",
    "temporary": "temporary peak (a layer's backward pass, the loss's logits or the optimizer's step)",
}
"""The fields of `planning.memory.Memory`, in words."""

LAYOUTS_SHOWN = 8


def plan_lines(plan: Plan, model: ModelConfig, name: str, gpu: str) -> Iterator[str]:
    """The lines of a plan; GB are 10^9 bytes."""
    asked = plan.asked
    layout = asked.layout
    yield f"{name}: {layout.ranks} ranks, {_layout(asked)}"
    yield ""
    for field, words in COMPONENTS.items():
        yield f"  {_gb(getattr(asked.memory, field))}  {words}"
    yield f"  {_gb(asked.outside)}  CUDA context and NCCL (assumed)"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield f"  {_gb(asked.bytes)}  a rank, the busiest pipeline stage's; {verdict} in {plan.gpu_bytes / 1e9:g} GB"
    yield ""
    cost = asked.cost
    yield (
        f"step: {cost.flops / 1e15:.3g} PFLOP in all, {cost.memory_traffic / 1e9:.3g} GB of masks and optimizer through a rank's memory, "
        f"{cost.link_traffic / 1e9:.3g} GB over its links"
    )
    yield (
        f"      {cost.seconds:.3g} s on {gpu}, {cost.tokens / cost.seconds:.3g} tokens/s (at {FLOPS_EFFICIENCY:.0%} of its peak FLOP/s and "
        f"{BANDWIDTH_EFFICIENCY:.0%} of its bandwidths, which is assumed)"
    )
    yield f"checkpoint: {checkpoint_bytes(model, asked.arguments) / 1e9:.3g} GB on disk"
    if plan.leanest is not None:
        yield f"the same is learned in {plan.leanest.bytes / 1e9:.1f} GB with: {plan.leanest.settings()}"
    if plan.remedy is not None:
        yield f"this layout fits with ({plan.remedy.bytes / 1e9:.1f} GB): {plan.remedy.settings()}"
    elif not plan.fits:
        yield "no setting makes this layout fit; use more GPUs, shorter sequences or smaller micro-batches"
    yield ""
    if plan.layouts:
        yield f"layouts of {layout.ranks} ranks that fit with the settings given, the fastest first:"
        for one in plan.layouts[:LAYOUTS_SHOWN]:
            yield f"  {_gb(one.bytes)}  {one.cost.seconds:8.3g} s/step  {_layout(one)}"
        if len(plan.layouts) > LAYOUTS_SHOWN:
            yield f"  and {len(plan.layouts) - LAYOUTS_SHOWN} more"
    else:
        yield f"no layout of {layout.ranks} ranks fits with the settings given"


def _layout(option: Option) -> str:
    layout = option.layout
    return f"tensor parallel {layout.tensor}, pipeline parallel {layout.pipeline}, data parallel {layout.data}"


def _gb(size: float) -> str:
    return f"{size / 1e9:8.2f} GB"
