"""The memory of one rank, tensor by tensor, as the training code allocates it.

Every number follows from shapes and types; `tests/planning/test_memory.py` compares the activations with what autograd really keeps.
Sizes are in bytes. Where ranks differ, a `Layout` names the pipeline stage, and the plan is the largest stage's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from maskllm.families.linears import LINEARS, MLP_LINEARS, linear_of
from maskllm.families.model_config import ModelConfig
from maskllm.families.registry import parameter_map
from maskllm.megatron.loss import MAX_CHUNK_LOGITS
from maskllm.patterns import Pattern
from maskllm.planning.models import StoredModel
from maskllm.training.arguments import TrainArguments
from maskllm.training.logits_adam import CHUNK
from maskllm.training.moments import QUANTIZATION_BLOCK

FLOAT_BYTES = {"fp32": 4.0, "bf16": 2.0, "8bit": 1.0 + 4.0 / QUANTIZATION_BLOCK}
"""Bytes an entry, of a quantized moment with its share of a scale."""


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks."""

    tensor: int
    pipeline: int
    data: int

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the busiest moment of a step."""

    weights: float
    """Frozen weights, embeddings and norms."""
    mask_bits: float
    """The prior mask and the winners at the last look, a bit a weight each."""
    mask_logits: float
    gradients: float
    optimizer_state: float
    activations: float
    """What the forward passes in flight keep for their backward passes, other than masked weights."""
    masked_weights: float
    """Weights times masks that are kept for backward passes."""
    communication: float
    """Buffers that transfers between ranks pass through."""
    temporary: float
    """The largest of: a layer's backward pass, the chunked loss, the optimizer's step."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


class Shapes:
    """Numbers of elements of a model's parts on one rank."""

    def __init__(self, model: ModelConfig, tensor: int) -> None:
        self.model = model
        self.tensor = tensor
        self.masked = {linear: math.prod(linear.shape(model, tensor)) for linear in LINEARS}
        """Weights of each masked linear of a layer."""
        self.layer_other = 0.0
        """A layer's norms and biases."""
        self.outside: dict[str, float] = {"embedding": 0.0, "output_layer": 0.0, "decoder.final_layernorm": 0.0}
        """Elements of what is not in a layer, by the beginning of its name."""
        for mapping in parameter_map(model):
            size = math.prod(mapping.megatron_shape(model))
            name = mapping.megatron
            if name.startswith("decoder.layers."):
                if not name.startswith("decoder.layers.0."):
                    continue
                linear = linear_of(name)
                if mapping.linear is None:  # a norm is on every rank, and so is the bias of a row-parallel linear
                    self.layer_other += size / tensor if linear is not None and linear.partition_dim == 0 else size
            else:
                key = next(key for key in self.outside if name.startswith(key))
                whole = "norm" in name or "position" in name
                self.outside[key] += size if whole else size / tensor

    def stage(self, stage: int, pipeline: int) -> tuple[float, float]:
        """(masked weights, other elements) of a pipeline stage."""
        layers = self.model.num_layers // pipeline
        other = layers * self.layer_other
        if stage == 0:
            other += self.outside["embedding"]
        if stage == pipeline - 1:
            other += self.outside["decoder.final_layernorm"]
            tied = self.model.tie_word_embeddings
            # Tied embeddings are one tensor where one stage has both ends of the model, else each end has a copy.
            other += self.outside["output_layer"] if not tied else self.outside["embedding"] * (pipeline > 1)
        return layers * sum(self.masked.values()), other


def largest_stage(model: StoredModel, arguments: TrainArguments, layout: Layout, *, device: str) -> Memory:
    """The memory of the pipeline stage that needs most, on "cuda" or on the "cpu"."""
    stages = (stage_memory(model, arguments, layout, stage, device=device) for stage in range(layout.pipeline))
    return max(stages, key=lambda memory: memory.total)


def stage_memory(model: StoredModel, arguments: TrainArguments, layout: Layout, stage: int, *, device: str) -> Memory:
    """The memory of one rank of a pipeline stage."""
    shapes = Shapes(model, layout.tensor)
    pattern = Pattern.parse(arguments.pattern)
    masked, other = shapes.stage(stage, layout.pipeline)
    element = FLOAT_BYTES[arguments.params_dtype]
    logit = FLOAT_BYTES[arguments.mask_logits_dtype]
    logits = masked / pattern.m * pattern.num_candidates
    moments = 2 * FLOAT_BYTES[arguments.optimizer_state_dtype]
    if arguments.use_distributed_optimizer:
        moments /= layout.data
    kept = activations(model, arguments, layout, stage, device=device)
    sequence = arguments.seq_length * arguments.micro_batch_size
    hidden = sequence * model.hidden_size * element
    # Weights that are computed with in another type than the checkpoint's are kept on the host in that type too.
    host_copy = model.stored_dtype.itemsize if device == "cpu" and arguments.dtype is not model.stored_dtype else 0
    communication = 0.0
    if layout.pipeline > 1:
        communication += 2 * hidden / sequence_split(arguments, layout)  # what is being sent and what is being received
    if sequence_split(arguments, layout) > 1:
        communication += hidden  # Megatron's buffer for gathered sequences
    return Memory(
        weights=(masked + other) * (element + host_copy),
        mask_bits=2 * masked / 8,
        mask_logits=logits * logit,
        gradients=logits * logit,
        optimizer_state=logits * moments,
        activations=kept.activations,
        masked_weights=kept.masked_weights,
        communication=communication,
        temporary=max(
            kept.backward,
            loss_temporary(model, arguments, layout) if stage == layout.pipeline - 1 else 0.0,
            optimizer_temporary(shapes, arguments, pattern),
        ),
    )


@dataclass(frozen=True)
class Kept:
    """What passes keep, in bytes."""

    activations: float
    masked_weights: float
    backward: float
    """Needed while one layer's backward pass, and the recomputation before it, runs."""


def activations(model: ModelConfig, arguments: TrainArguments, layout: Layout, stage: int, *, device: str) -> Kept:
    """What the micro-batches in flight on a pipeline stage keep for their backward passes."""
    element = FLOAT_BYTES[arguments.params_dtype]
    linears = Shapes(model, layout.tensor).masked
    masked = sum(linears.values()) * element
    mlp_masked = sum(size for linear, size in linears.items() if linear in MLP_LINEARS) * element
    layer = layer_activations(model, arguments, layout, device=device)
    layers = model.num_layers // layout.pipeline
    tokens = arguments.seq_length * arguments.micro_batch_size
    boundary = tokens * model.hidden_size * element / sequence_split(arguments, layout)
    # Beside the layers' own.
    others = 0.0
    if stage == 0 and arguments.recompute_granularity is None:
        # The first norm's input, the frozen embeddings, asks for no gradient.
        others -= norm_activations(model, arguments, layout, device=device)
    if stage == layout.pipeline - 1:
        others += norm_activations(model, arguments, layout, device=device)
        others += tokens * (model.hidden_size * element + 4)  # the hidden states' gradient, which the loss keeps, and the losses
    if layout.pipeline > 1:
        others += boundary  # the stage's output, until the next stage's gradient comes

    kept_layers, recomputed = layers, 0.0
    kept_masked = masked
    if arguments.recompute_granularity == "full":
        group = arguments.recompute_num_layers
        uniform = arguments.recompute_method == "uniform"
        kept_layers = 0 if uniform else layers - group
        others += (layers // group if uniform else group) * boundary
        if model.rope is not None:
            others += 4 * arguments.seq_length * model.rope.dim  # the angles, which layers would otherwise turn into factors
        recomputed = (group if uniform else 1) * (layer + masked)
    if arguments.recomputes("mlp"):
        kept_masked -= mlp_masked
        recomputed = tokens * mlp_activations(model, layout.tensor) * element + mlp_masked
    if arguments.recomputes("masked_weight"):
        kept_masked = 0.0
        recomputed = recomputed - mlp_masked * arguments.recomputes("mlp") + max(linears.values()) * element
    in_flight = min(layout.pipeline - stage, arguments.num_microbatches(layout.data))
    return Kept(
        activations=in_flight * (kept_layers * layer + others),
        masked_weights=in_flight * kept_layers * kept_masked,
        backward=recomputed + max(linears.values()) * element + backward_activations(model, arguments, layout),
    )


def norm_activations(model: ModelConfig, arguments: TrainArguments, layout: Layout, *, device: str) -> float:
    """What a norm keeps: its input and a factor or two for each token. On a CPU torch composes RMSNorm of fp32 operators."""
    tokens = arguments.seq_length * arguments.micro_batch_size / sequence_split(arguments, layout)
    rms = model.normalization == "RMSNorm"
    element = 4.0 if rms and device == "cpu" else FLOAT_BYTES[arguments.params_dtype]
    return tokens * (model.hidden_size * element + (4 if rms else 8))


def layer_activations(model: ModelConfig, arguments: TrainArguments, layout: Layout, *, device: str) -> float:
    """What one layer's forward pass keeps for its backward pass, without masked weights.

    Attention is torch's (or Transformer Engine's) fused one, whose scores are never whole.
    """
    element = FLOAT_BYTES[arguments.params_dtype]
    tokens = arguments.seq_length * arguments.micro_batch_size
    norms = 2 * norm_activations(model, arguments, layout, device=device)
    normed = 2 * tokens * model.hidden_size * element / sequence_split(arguments, layout)  # what QKV and fc1 multiply
    query = model.num_attention_heads * model.head_dim / layout.tensor
    key = model.num_query_groups * model.head_dim / layout.tensor
    projected = query + 2 * key  # one tensor, kept for the values in it
    attended = query  # what the output projection multiplies
    rotated = query + key if model.rope is not None else 0.0
    attention = tokens * (projected + rotated + attended) * element
    if not arguments.recomputes("core_attn"):
        attention += tokens * 4 * model.num_attention_heads / layout.tensor
        if device == "cuda" and arguments.params_dtype == "fp32" and key < query:
            attention += tokens * 2 * query * element  # keys and values once for each head: see `SDPACoreAttention`
    angles = 4 * arguments.seq_length * model.rope.dim * element if model.rope is not None else 0.0
    inner = 0.0 if arguments.recomputes("mlp") else tokens * mlp_activations(model, layout.tensor) * element
    return norms + normed + attention + angles + inner


def mlp_activations(model: ModelConfig, tensor: int) -> float:
    """Elements for each token that the MLP keeps beyond its input.

    Gated: fc1's output, its gate activated, its other half with an offset of zero, and their product. Else fc1's output and the
    activation's (of squared ReLU: that of ReLU and its square).
    """
    return (5 if model.gated_mlp else 2) * model.ffn_hidden_size / tensor


def backward_activations(model: ModelConfig, arguments: TrainArguments, layout: Layout) -> float:
    """Gradients of activations that live at once while a layer goes backward: those of the MLP's inner width."""
    tokens = arguments.seq_length * arguments.micro_batch_size
    width = model.ffn_hidden_size / layout.tensor * (2 if model.gated_mlp else 1)
    return tokens * (2 * width + 2 * model.hidden_size) * FLOAT_BYTES[arguments.params_dtype]


def loss_temporary(model: ModelConfig, arguments: TrainArguments, layout: Layout) -> float:
    """The logits of one chunk of the loss in fp32, and again in the weights' type."""
    vocabulary = model.vocab_size // layout.tensor
    tokens = min(arguments.seq_length * arguments.micro_batch_size, max(1, MAX_CHUNK_LOGITS // vocabulary))
    return tokens * vocabulary * (4 + FLOAT_BYTES[arguments.params_dtype])


def optimizer_temporary(shapes: Shapes, arguments: TrainArguments, pattern: Pattern) -> float:
    """What the optimizer needs while it steps."""
    largest = max(shapes.masked.values()) / pattern.m * pattern.num_candidates
    if arguments.low_precision:
        # Seven numbers of four bytes an entry: gradient, moments, update, random number, and two steps of rounding.
        return 28 * min(largest, CHUNK)
    # Megatron's clipping without Transformer Engine or Apex scales one gradient at a time into a copy.
    return 4 * largest


def sequence_split(arguments: TrainArguments, layout: Layout) -> int:
    """Into how many parts the activations outside of the linears are split along the sequence."""
    return layout.tensor if arguments.sequence_parallel else 1
