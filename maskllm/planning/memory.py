"""The memory of one rank, tensor by tensor, as the training code allocates it.

Every number follows from shapes and dtypes. `tests/planning/test_memory.py` compares the activations with what autograd keeps, and
the total with the peak of real runs. Sizes are in bytes. Pipeline stages differ; the plan is that of the largest stage.
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
"""Bytes per entry. An 8-bit moment includes its share of the block's scale."""


@dataclass(frozen=True)
class Layout:
    """The parallel sizes: tensor, pipeline and data."""

    tensor: int
    pipeline: int
    data: int

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the busiest moment of a step."""

    weights: float
    """Frozen weights, embeddings and norms."""
    mask_bits: float
    """The prior mask and the winners of the last check, one bit per weight each."""
    mask_logits: float
    gradients: float
    optimizer_state: float
    activations: float
    """Tensors that micro-batches in flight keep for their backward passes, without masked weights."""
    masked_weights: float
    """Weights times masks, kept for backward passes."""
    communication: float
    """Buffers for transfers between ranks."""
    temporary: float
    """The largest of: a layer's backward pass, the chunked loss, the optimizer's step."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(vars(self).values())


class Shapes:
    """The number of elements in each part of a model on one of `tensor` tensor-parallel ranks."""

    def __init__(self, model: ModelConfig, tensor: int) -> None:
        self.model = model
        self.tensor = tensor
        self.masked = {linear: math.prod(linear.shape(model, tensor)) for linear in LINEARS}
        """Weights in each masked linear of a layer."""
        self.layer_other = 0.0
        """Elements in a layer's norms and biases."""
        self.outside: dict[str, float] = {"embedding": 0.0, "output_layer": 0.0, "decoder.final_layernorm": 0.0}
        """Elements outside the layers: start of a tensor's name -> elements."""
        model = model.padded(tensor)
        for mapping in parameter_map(model):
            size = math.prod(mapping.megatron_shape(model))
            name = mapping.megatron
            if name.startswith("decoder.layers."):
                if not name.startswith("decoder.layers.0."):
                    continue
                linear = linear_of(name)
                if mapping.linear is None:  # each rank holds the whole norm, and the whole bias of a row-parallel linear
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
            # A single stage has one tensor for both ends of a model with tied embeddings. Otherwise each end has a copy.
            other += self.outside["output_layer"] if not tied else self.outside["embedding"] * (pipeline > 1)
        return layers * sum(self.masked.values()), other


def largest_stage(model: StoredModel, arguments: TrainArguments, layout: Layout, *, device: str) -> Memory:
    """The memory of one rank of the pipeline stage that needs most, on `device` "cuda" or "cpu"."""
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
    # If the run computes in another dtype than the checkpoint's, the host also keeps the weights in the checkpoint's dtype.
    host_copy = model.stored_dtype.itemsize if device == "cpu" and arguments.dtype is not model.stored_dtype else 0
    communication = 0.0
    if layout.pipeline > 1:
        communication += 2 * hidden / sequence_split(arguments, layout)  # one buffer to send and one to receive
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
    """Bytes that forward and backward passes need."""

    activations: float
    masked_weights: float
    backward: float
    """Needed only while one layer's recomputation and backward pass run."""


def activations(model: ModelConfig, arguments: TrainArguments, layout: Layout, stage: int, *, device: str) -> Kept:
    """What the micro-batches in flight on pipeline stage `stage` keep for their backward passes."""
    element = FLOAT_BYTES[arguments.params_dtype]
    linears = Shapes(model, layout.tensor).masked
    masked = sum(linears.values()) * element
    mlp_masked = sum(size for linear, size in linears.items() if linear in MLP_LINEARS) * element
    layer = layer_activations(model, arguments, layout, device=device)
    layers = model.num_layers // layout.pipeline
    tokens = arguments.seq_length * arguments.micro_batch_size
    boundary = tokens * model.hidden_size * element / sequence_split(arguments, layout)
    others = 0.0  # activations outside the layers
    if stage == 0 and arguments.recompute_granularity is None:
        # The first norm's input comes from frozen embeddings and needs no gradient.
        others -= norm_activations(model, arguments, layout, device=device)
    if stage == layout.pipeline - 1:
        others += norm_activations(model, arguments, layout, device=device)
        others += tokens * (model.hidden_size * element + 4)  # the loss keeps the hidden states' gradient and the losses
    if layout.pipeline > 1:
        others += boundary  # the stage's output, until its gradient arrives

    kept_layers, recomputed = layers, 0.0
    kept_masked = masked
    if arguments.recompute_granularity == "full":
        group = arguments.recompute_num_layers
        uniform = arguments.recompute_method == "uniform"
        kept_layers = 0 if uniform else layers - group
        others += (layers // group if uniform else group) * boundary
        if model.rope is not None:
            kinds = 2 if model.local_rope is not None else 1
            others += 4 * kinds * arguments.seq_length * model.rope.dim  # the rotary angles
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
    """Bytes that a norm keeps: its input, and one (RMSNorm) or two (LayerNorm) fp32 factors per token."""
    tokens = arguments.seq_length * arguments.micro_batch_size / sequence_split(arguments, layout)
    element = norm_element(model, arguments, device=device)
    return tokens * (model.hidden_size * element + (4 if model.normalization == "RMSNorm" else 8))


def norm_element(model: ModelConfig, arguments: TrainArguments, *, device: str) -> float:
    """Bytes per entry of the input that a norm keeps.

    On a CPU torch composes RMSNorm from fp32 operators. The norms of Gemma compute in fp32 (`ZeroCenteredRMSNorm`).
    """
    in_fp32 = model.normalization == "RMSNorm" and (device == "cpu" or model.zero_centered_norm)
    return 4.0 if in_fp32 else FLOAT_BYTES[arguments.params_dtype]


def layer_activations(model: ModelConfig, arguments: TrainArguments, layout: Layout, *, device: str) -> float:
    """Bytes that one layer's forward pass keeps for its backward pass, without masked weights; the mean over all layers.

    Attention is torch's or Transformer Engine's fused attention, which never holds all scores, or soft-capped attention, which
    computes them again in the backward pass.
    """
    element = FLOAT_BYTES[arguments.params_dtype]
    tokens = arguments.seq_length * arguments.micro_batch_size
    norms = (4 if model.post_norms else 2) * norm_activations(model, arguments, layout, device=device)
    normed = 2 * tokens * model.hidden_size * element / sequence_split(arguments, layout)  # the inputs of QKV and fc1
    query = model.num_attention_heads * model.head_dim / layout.tensor
    key = model.num_query_groups * model.head_dim / layout.tensor
    projected = query + 2 * key  # one tensor; attention keeps it for the values
    attended = query  # the output projection's input
    rotated = query + key if model.rope is not None else 0.0
    attention = tokens * (projected + rotated + attended) * element
    if model.qk_norm:
        kept_as = norm_element(model, arguments, device=device)
        # If the norm does not convert its input, the keys are part of `projected`; the queries are copied from it.
        attention += tokens * (query * element if kept_as == element else (query + key) * kept_as)
        attention += tokens * 4 * (model.num_attention_heads + model.num_query_groups) / layout.tensor
    if not arguments.recomputes("core_attn"):
        window = model.window or arguments.seq_length
        masked_layers = sum(model.windowed_layers) / model.num_layers if window < arguments.seq_length else 0.0
        if model.attention_softcap is not None:
            attention += arguments.seq_length**2  # the mask, in bools
        else:
            attention += tokens * 4 * model.num_attention_heads / layout.tensor
            attention += masked_layers * arguments.seq_length**2 * element  # the window's mask
            repeated = 1.0 if arguments.params_dtype == "fp32" else masked_layers
            if device == "cuda" and key < query:
                attention += repeated * tokens * 2 * query * element  # keys and values for each head: see `SDPACoreAttention`
    angles = 4 * arguments.seq_length * model.rope.dim * element if model.rope is not None else 0.0
    inner = 0.0 if arguments.recomputes("mlp") else tokens * mlp_activations(model, layout.tensor) * element
    return norms + normed + attention + angles + inner


def mlp_activations(model: ModelConfig, tensor: int) -> float:
    """Elements per token that the MLP keeps, besides its input.

    A gated MLP keeps fc1's output (two widths), the activated gate, the up half plus an offset of zero, and their product. Another
    MLP keeps fc1's output and the activation's output (for squared ReLU: the outputs of ReLU and of the square).
    """
    return (5 if model.gated_mlp else 2) * model.ffn_hidden_size / tensor


def backward_activations(model: ModelConfig, arguments: TrainArguments, layout: Layout) -> float:
    """Bytes of the activation gradients that exist at the same time in a layer's backward pass: those of the MLP's inner width.

    With soft-capping, the scores of one query group may need more: four in the weights' dtype and two in fp32.
    """
    tokens = arguments.seq_length * arguments.micro_batch_size
    width = model.ffn_hidden_size / layout.tensor * (2 if model.gated_mlp else 1)
    mlp = tokens * (2 * width + 2 * model.hidden_size) * FLOAT_BYTES[arguments.params_dtype]
    if model.attention_softcap is None:
        return mlp
    scores = tokens * arguments.seq_length * model.num_attention_heads / model.num_query_groups
    return max(mlp, scores * (4 * FLOAT_BYTES[arguments.params_dtype] + 2 * 4))


def loss_temporary(model: ModelConfig, arguments: TrainArguments, layout: Layout) -> float:
    """Bytes of one chunk of vocabulary logits in the loss, in fp32 and again in the weights' dtype; with soft-capping also its slope."""
    vocabulary = model.padded(layout.tensor).dimensions()["vocab"] // layout.tensor
    tokens = min(arguments.seq_length * arguments.micro_batch_size, max(1, MAX_CHUNK_LOGITS // vocabulary))
    slope = 4 if model.logit_softcap is not None else 0
    return tokens * vocabulary * (4 + slope + FLOAT_BYTES[arguments.params_dtype])


def optimizer_temporary(shapes: Shapes, arguments: TrainArguments, pattern: Pattern) -> float:
    """Bytes that the optimizer needs during its step."""
    largest = max(shapes.masked.values()) / pattern.m * pattern.num_candidates
    if arguments.low_precision:
        # Seven 4-byte numbers per entry: gradient, two moments, update, random number, and two intermediates of the rounding.
        return 28 * min(largest, CHUNK)
    # Without Transformer Engine and Apex, Megatron's clipping scales a copy of one gradient at a time.
    return 4 * largest


def sequence_split(arguments: TrainArguments, layout: Layout) -> int:
    """The number of parts into which sequence parallelism splits the activations between the linears."""
    return layout.tensor if arguments.sequence_parallel else 1
