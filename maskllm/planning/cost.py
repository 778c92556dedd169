"""The arithmetic, memory traffic and time of a training step, and the size of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from maskllm.families.linears import MLP_LINEARS
from maskllm.families.model_config import ModelConfig
from maskllm.planning.memory import FLOAT_BYTES, Layout, Shapes, sequence_split
from maskllm.planning.models import StoredModel
from maskllm.training.arguments import TrainArguments


@dataclass(frozen=True)
class GPU:
    """Numbers from a GPU's data sheet: bytes of memory, dense bf16 FLOP/s, memory bytes/s, and link bytes/s in one direction."""

    memory: float
    flops: float
    bandwidth: float
    link: float


GPUS = {
    "a100-40gb": GPU(40e9, 312e12, 1.555e12, 300e9),
    "a100-80gb": GPU(80e9, 312e12, 2.039e12, 300e9),
    "h100-80gb": GPU(80e9, 989e12, 3.35e12, 450e9),
    "h200-141gb": GPU(141e9, 989e12, 4.8e12, 450e9),
    "b200-192gb": GPU(192e9, 2250e12, 8.0e12, 900e9),
    "l40s-48gb": GPU(48e9, 362e12, 0.864e12, 32e9),
}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes."""

    gpu: GPU
    gpus_per_node: int = 8
    network: float = 50e9
    """Bytes/s from one GPU to other nodes. The default is one 400 Gbit/s adapter per GPU."""

    def link(self, span: int) -> float:
        """Bytes/s of the slowest link in a group of `span` consecutive ranks."""
        return self.gpu.link if span <= self.gpus_per_node else min(self.gpu.link, self.network)


FLOPS_EFFICIENCY = 0.4
"""Assumed share of the peak FLOP/s that matrix products and attention reach; usual for models of these sizes."""
BANDWIDTH_EFFICIENCY = 0.7
"""Assumed share of memory and link bandwidth that mask sampling, the optimizer and all-reduces reach."""
FP32 = FLOAT_BYTES["fp32"]


@dataclass(frozen=True)
class Cost:
    """What one step of the job costs."""

    flops: float
    """FLOPs of all ranks together, including recomputation."""
    memory_traffic: float
    """Bytes that masks, the sums of weights' gradients and the optimizer move on one rank."""
    link_traffic: float
    """Bytes that all-reduces and transfers move from one rank."""
    seconds: float | None
    """Expected time on GPUs; None on CPUs."""
    tokens: int
    """Tokens in a step."""


def step_cost(model: ModelConfig, arguments: TrainArguments, layout: Layout, cluster: Cluster | None) -> Cost:
    """The cost of one step on the GPUs of `cluster`, or on CPUs (None).

    The time assumes the efficiencies above, and that transfers and matrix products do not overlap.
    """
    tokens = arguments.global_batch_size * arguments.seq_length
    layers = model.num_layers
    shapes = Shapes(model, layout.tensor)
    linears = Shapes(model, 1).masked
    mlp = sum(size for linear, size in linears.items() if linear in MLP_LINEARS)
    # Causal attention computes half of the scores.
    attention = 2 * arguments.seq_length * model.num_attention_heads * model.head_dim
    forward = 2 * sum(linears.values()) + attention
    again = _recomputed_layers(arguments, layers // layout.pipeline) * forward
    again += 2 * mlp * arguments.recomputes("mlp") + attention * arguments.recomputes("core_attn")
    backward = 2 * forward
    # The backward pass has the gradients of the inputs and of the masked weights, whether they are for weights, logits or both.
    # Of the output matrix: the logits and the hidden states' gradient, and the gradient of the matrix if that is trained.
    product = 2 * model.vocab_size * model.hidden_size
    output = (3 if arguments.train_embeddings else 2) * product
    teacher = arguments.distills * layers * forward + (product if arguments.kl_loss_coeff else 0)
    flops = tokens * (layers * (forward + again + backward) + output + teacher)

    masked = layers / layout.pipeline * sum(shapes.masked.values())
    logits = shapes.logits(masked, arguments)
    trained = max(shapes.trained(stage, layout.pipeline, arguments) for stage in range(layout.pipeline))
    micro_batches = arguments.num_microbatches(layout.data)
    weight, logit = FLOAT_BYTES[arguments.params_dtype], FLOAT_BYTES[arguments.mask_logits_dtype]
    sampling = micro_batches * trained * (weight + 2 * FP32)  # each gradient of a weight is added to those of the step
    if arguments.trains_masks:
        draw = masked * 2 * weight + logits * logit
        redrawn = _recomputed_layers(arguments, layers // layout.pipeline)
        redrawn += arguments.recomputes("mlp") * mlp / sum(linears.values())
        draws = 1 + (1.0 if arguments.recomputes("masked_weight") else redrawn)
        of_weights = masked * weight if arguments.trains_weights else 0.0
        sampling += micro_batches * (draws * draw + masked * 2 * weight + logits * 3 * logit + of_weights)
    elif arguments.uses_cast:
        sampling += micro_batches * masked * 5 * weight  # the weight is multiplied by its scales, and so is its gradient
    else:
        sampling += micro_batches * masked * 2 * weight  # the gradient is multiplied by the mask
    moments = 2 * FLOAT_BYTES[arguments.optimizer_state_dtype]
    # The last terms read the gradients for their norm, and write bf16 weights from their masters.
    optimizer = logits * (3 * logit + 2 * moments + logit)
    optimizer += trained * (3 * FP32 + 2 * 2 * FP32 + FP32 + (weight if arguments.params_dtype == "bf16" else 0))
    if arguments.use_distributed_optimizer:
        optimizer /= layout.data

    hidden = arguments.seq_length * arguments.micro_batch_size * model.hidden_size * weight
    t, d, p = layout.tensor, layout.data, layout.pipeline
    # All-reduces in a layer: two forward and two backward. With a split sequence, two weights' gradients gather the inputs again
    # (`LinearWithGradAccumulationAndAsyncCommunication` in megatron.core.tensor_parallel.layers), half an all-reduce each.
    # Recomputation repeats those of the forward pass, and so does a teacher.
    reductions = 4 + arguments.sequence_parallel + arguments.recomputes("mlp") + 2 * _recomputed_layers(arguments, layers // p)
    reductions += 2 * arguments.distills
    within_layers = micro_batches * layers / p * reductions * 2 * hidden * (t - 1) / t
    # With the distributed optimizer the second half of the all-reduce is the all-gather of the parameters.
    of_weight = FP32 + (weight if arguments.use_distributed_optimizer else FP32)
    gradients = (2 * logits * logit + trained * of_weight) * (d - 1) / d
    # A teacher's hidden states travel with the student's.
    between_stages = micro_batches * 2 * hidden * (2 if arguments.distills else 1) / sequence_split(arguments, layout) * (p > 1)
    shared = 0.0  # the gradient of tied embeddings, summed over the first and the last stage
    if arguments.train_embeddings and model.tie_word_embeddings and p > 1:
        shared = shapes.output_matrix * FP32

    seconds = None
    if cluster is not None:
        gpu = cluster.gpu
        bubble = (micro_batches + p - 1) / micro_batches
        products = flops / layout.ranks / (gpu.flops * FLOPS_EFFICIENCY)
        # The span of a group in consecutive ranks: Megatron numbers tensor-parallel ranks first, then data-parallel ones.
        micro = sampling / gpu.bandwidth + within_layers / cluster.link(t) + between_stages / cluster.link(t * d * p)
        once = optimizer / gpu.bandwidth + gradients / cluster.link(t * d) + shared / cluster.link(t * d * p)
        seconds = bubble * (products + micro / BANDWIDTH_EFFICIENCY) + once / BANDWIDTH_EFFICIENCY
    return Cost(flops, sampling + optimizer, within_layers + gradients + between_stages + shared, seconds, tokens)


def checkpoint_bytes(model: StoredModel, arguments: TrainArguments) -> float:
    """Bytes of a training checkpoint on disk: weights, prior or fixed mask's bits, logits, masters and moments (8-bit ones as fp32).

    Frozen weights have the source's dtype, trained ones that of the computation. Megatron's distributed optimizer adds its own fp32 copy
    of all that is trained.
    """
    shapes = Shapes(model, 1)
    masked, other = shapes.stage(0, 1)
    logits, trained = shapes.logits(masked, arguments), shapes.trained(0, 1, arguments)
    moment = FLOAT_BYTES["fp32" if arguments.optimizer_state_dtype == "8bit" else arguments.optimizer_state_dtype]
    weights = (masked + other - trained) * model.stored_dtype.itemsize + trained * FLOAT_BYTES[arguments.params_dtype]
    own_copy = FP32 if arguments.use_distributed_optimizer else 0
    master = FP32 if arguments.use_distributed_optimizer or arguments.params_dtype == "bf16" else 0
    of_logits = logits * (FLOAT_BYTES[arguments.mask_logits_dtype] + 2 * moment + own_copy)
    return weights + masked / 8 + of_logits + trained * (2 * FP32 + master)


def _recomputed_layers(arguments: TrainArguments, stage_layers: int) -> float:
    """Share of the layers whose forward pass full recomputation repeats."""
    if arguments.recompute_granularity != "full":
        return 0.0
    return 1.0 if arguments.recompute_method == "uniform" else arguments.recompute_num_layers / stage_layers
