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
from maskllm.masking.scaling import GROUPS
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
    """Weights, embeddings, norms and CAST's scales."""
    teacher: float
    """Those of a teacher that is a second model."""
    mask_bits: float
    """The fixed mask; or the prior mask and the winners of the last check; or CAST's mask and that of a validation. One bit per weight
    each."""
    mask_logits: float
    gradients: float
    masters: float
    """fp32 copies of trained bf16 weights, which the optimizer updates."""
    optimizer_state: float
    """Adam's moments."""
    activations: float
    """Tensors that micro-batches in flight keep for their backward passes, without masked weights."""
    masked_weights: float
    """Weights times masks, or times CAST's scales, kept for backward passes."""
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

    def trained(self, stage: int, pipeline: int, arguments: TrainArguments) -> float:
        """Elements of the weights, norms and biases that a pipeline stage trains (`maskllm.training.trainables.is_trained`)."""
        if not arguments.trains_weights:
            return 0.0
        if arguments.train_embeddings:
            return sum(self.stage(stage, pipeline))
        return self.model.num_layers // pipeline * (sum(self.masked.values()) + self.layer_other)

    def logits(self, masked: float, arguments: TrainArguments) -> float:
        """The number of logits of `masked` weights."""
        pattern = Pattern.parse(arguments.pattern)
        return masked / pattern.m * pattern.num_candidates if arguments.trains_masks else 0.0

    def scales(self, pipeline: int, arguments: TrainArguments) -> float:
        """The number of CAST's scales, which are fp32 and trained, on a rank."""
        rows = sum(linear.shape(self.model, self.tensor)[0] for linear in LINEARS)
        return self.model.num_layers // pipeline * rows * GROUPS if arguments.uses_cast else 0.0

    @property
    def output_matrix(self) -> float:
        """Elements of the output matrix, which may be that of the embeddings."""
        return self.vocabulary * self.model.hidden_size

    @property
    def vocabulary(self) -> int:
        """Rows of the output matrix."""
        return self.model.padded(self.tensor).dimensions()["vocab"] // self.tensor


def largest_stage(model: StoredModel, arguments: TrainArguments, layout: Layout, *, device: str) -> Memory:
    """The memory of one rank of the pipeline stage that needs most, on `device` "cuda" or "cpu"."""
    stages = (stage_memory(model, arguments, layout, stage, device=device) for stage in range(layout.pipeline))
    return max(stages, key=lambda memory: memory.total)


def stage_memory(model: StoredModel, arguments: TrainArguments, layout: Layout, stage: int, *, device: str) -> Memory:
    """The memory of one rank of a pipeline stage."""
    shapes = Shapes(model, layout.tensor)
    masked, other = shapes.stage(stage, layout.pipeline)
    trained = shapes.trained(stage, layout.pipeline, arguments)
    element = FLOAT_BYTES[arguments.params_dtype]
    logit = FLOAT_BYTES[arguments.mask_logits_dtype]
    logits = shapes.logits(masked, arguments)
    masters = trained * FLOAT_BYTES["fp32"] if arguments.params_dtype == "bf16" else 0.0
    scales = shapes.scales(layout.pipeline, arguments)
    state = logits * 2 * FLOAT_BYTES[arguments.optimizer_state_dtype] + (trained + scales) * 2 * FLOAT_BYTES["fp32"]
    if arguments.use_distributed_optimizer:
        masters /= layout.data
        state /= layout.data
    kept = activations(model, arguments, layout, stage, device=device)
    sequence = arguments.seq_length * arguments.micro_batch_size
    hidden = sequence * model.hidden_size * element
    # If the run computes in another dtype than the checkpoint's, the host also keeps the frozen weights in the checkpoint's dtype.
    host_copy = model.stored_dtype.itemsize if device == "cpu" and arguments.dtype is not model.stored_dtype else 0
    communication = 0.0
    if layout.pipeline > 1:
        # One buffer to send and one to receive. A teacher's hidden states travel with the student's.
        communication += 2 * hidden * (2 if arguments.distills else 1) / sequence_split(arguments, layout)
    if sequence_split(arguments, layout) > 1:
        communication += hidden  # Megatron's buffer for gathered sequences
    return Memory(
        weights=(masked + other) * element + (masked + other - trained) * host_copy + scales * FLOAT_BYTES["fp32"],
        teacher=(masked + other) * element if arguments.has_separate_teacher else 0.0,
        mask_bits=(2 if arguments.chooses_masks else 1) * masked / 8,
        mask_logits=logits * logit,
        gradients=logits * logit + (trained + scales) * FLOAT_BYTES["fp32"],
        masters=masters,
        optimizer_state=state,
        activations=kept.activations,
        masked_weights=kept.masked_weights,
        communication=communication,
        temporary=max(
            kept.backward,
            loss_temporary(model, arguments, layout, device=device) if stage == layout.pipeline - 1 else 0.0,
            optimizer_temporary(shapes, arguments),
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
    shapes = Shapes(model, layout.tensor)
    linears = shapes.masked
    # A trained weight with a fixed mask is multiplied itself.
    masked = sum(linears.values()) * element if arguments.chooses_masks else 0.0
    mlp_masked = (
        sum(size for linear, size in linears.items() if linear in MLP_LINEARS) * element if arguments.chooses_masks else 0.0
    )
    largest = max(linears.values())
    layer = layer_activations(model, arguments, layout, device=device)
    layers = model.num_layers // layout.pipeline
    tokens = arguments.seq_length * arguments.micro_batch_size
    boundary = tokens * model.hidden_size * element / sequence_split(arguments, layout)
    is_first, is_last = stage == 0, stage == layout.pipeline - 1
    others = 0.0  # activations outside the layers
    if is_first and arguments.recompute_granularity is None and not arguments.train_embeddings:
        # The first norm's input comes from frozen embeddings and needs no gradient.
        others -= norm_activations(model, arguments, layout, device=device)
        others += frozen_input_norm(model, arguments, layout, device=device)
    if is_last:
        others += norm_activations(model, arguments, layout, device=device, trained=arguments.train_embeddings)
        others += tokens * (model.hidden_size * element + 4)  # the loss keeps the hidden states' gradient and the losses
        if arguments.train_embeddings:
            others += 4 * shapes.output_matrix  # and the output matrix's gradient, in fp32
    if layout.pipeline > 1 and not arguments.distills:
        others += boundary  # the stage's output, until its gradient arrives
    if arguments.distills:
        others += 2 * boundary * ((not is_first) + (not is_last))  # the stage's input and output, with those of the teacher
    if arguments.squarehead_loss_coeff:
        others += layers * boundary  # the teacher's hidden states
        if not is_last and arguments.recompute_granularity != "full":
            # No norm keeps the last layer's output.
            others += boundary - compared_activations(model, arguments, layout, device=device)

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
    if arguments.recomputes("masked_weight") and arguments.chooses_masks:
        kept_masked = 0.0
        recomputed = recomputed - mlp_masked * arguments.recomputes("mlp") + largest * element
    gradients = weight_gradients(arguments, device=device) * largest
    if arguments.train_embeddings and model.tie_word_embeddings and is_first and is_last:
        gradients += shapes.output_matrix * element  # the output matrix's gradient waits for that of the embeddings
    in_flight = min(layout.pipeline - stage, arguments.num_microbatches(layout.data))
    return Kept(
        activations=in_flight * (kept_layers * layer + others),
        masked_weights=in_flight * kept_layers * kept_masked,
        backward=recomputed + gradients + backward_activations(model, arguments, layout),
    )


def weight_gradients(arguments: TrainArguments, *, device: str) -> float:
    """Bytes per entry of the gradients that one masked linear has at the same time, before they are added to those of the step."""
    element = FLOAT_BYTES[arguments.params_dtype]
    if not arguments.trains_weights:
        return element  # of the masked weight; the operator adds those of the logits in place
    # The gradients of the masked weight and of the weight; with a fixed mask also the mask, in bools.
    gradients = 2 * element + (0 if arguments.chooses_masks else 1)
    if arguments.uses_cast:
        gradients = max(gradients, element + 4)  # the scales' gradient comes from products in fp32
    # On a CPU, torch adds a bf16 tensor to an fp32 one by way of an fp32 copy.
    return max(gradients, element + 4) if device == "cpu" and arguments.params_dtype == "bf16" else gradients


def norm_activations(
    model: ModelConfig, arguments: TrainArguments, layout: Layout, *, device: str, trained: bool | None = None
) -> float:
    """Bytes that a norm keeps: its input, and one (RMSNorm) or two (LayerNorm) fp32 factors per token.

    On a CPU, RMSNorm with a trained weight also keeps its result before the product with the weight, in fp32. `trained` is whether the
    weight is trained, by default as in the layers.
    """
    tokens = arguments.seq_length * arguments.micro_batch_size / sequence_split(arguments, layout)
    element = norm_element(model, arguments, device=device)
    if trained if trained is not None else arguments.trains_weights:
        element += _normalized_element(model, device=device)
    return tokens * (model.hidden_size * element + (4 if model.normalization == "RMSNorm" else 8))


def frozen_input_norm(model: ModelConfig, arguments: TrainArguments, layout: Layout, *, device: str) -> float:
    """Bytes that a norm keeps if its input needs no gradient."""
    if not arguments.trains_weights:
        return 0.0
    if normalized := _normalized_element(model, device=device):
        tokens = arguments.seq_length * arguments.micro_batch_size / sequence_split(arguments, layout)
        return tokens * model.hidden_size * normalized
    return norm_activations(model, arguments, layout, device=device)


def _normalized_element(model: ModelConfig, *, device: str) -> float:
    """Bytes per entry of the result that a trained norm keeps before the product with its weight."""
    return 4.0 if model.normalization == "RMSNorm" and device == "cpu" else 0.0


def compared_activations(model: ModelConfig, arguments: TrainArguments, layout: Layout, *, device: str) -> float:
    """Bytes of a layer's output that SquareHead keeps, unless the next norm keeps the same tensor as its input."""
    element = FLOAT_BYTES[arguments.params_dtype]
    if not arguments.squarehead_loss_coeff or norm_element(model, arguments, device=device) == element:
        return 0.0
    tokens = arguments.seq_length * arguments.micro_batch_size / sequence_split(arguments, layout)
    return tokens * model.hidden_size * element


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
        if arguments.trains_weights:
            attention += tokens * (query + key) * _normalized_element(model, device=device)
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
    return norms + normed + attention + angles + inner + compared_activations(model, arguments, layout, device=device)


def mlp_activations(model: ModelConfig, tensor: int) -> float:
    """Elements per token that the MLP keeps, besides its input.

    A gated MLP keeps fc1's output (two widths), the activated gate, the up half plus an offset of zero, and their product. Another
    MLP keeps fc1's output and the activation's output (for squared ReLU: the outputs of ReLU and of the square).
    """
    return (5 if model.gated_mlp else 2) * model.ffn_hidden_size / tensor


def backward_activations(model: ModelConfig, arguments: TrainArguments, layout: Layout) -> float:
    """Bytes of the activation gradients that exist at the same time in a layer's backward pass: those of the MLP's inner width.

    With soft-capping, the scores of one query group may need more: four in the weights' dtype and two in fp32. So may SquareHead: two
    gradients of a layer's output in the weights' dtype and two more in fp32.
    """
    tokens = arguments.seq_length * arguments.micro_batch_size
    width = model.ffn_hidden_size / layout.tensor * (2 if model.gated_mlp else 1)
    element = FLOAT_BYTES[arguments.params_dtype]
    most = tokens * (2 * width + 2 * model.hidden_size) * element
    if model.attention_softcap is not None:
        scores = tokens * arguments.seq_length * model.num_attention_heads / model.num_query_groups
        most = max(most, scores * (4 * element + 2 * 4))
    if arguments.squarehead_loss_coeff:
        most = max(most, tokens / sequence_split(arguments, layout) * model.hidden_size * (2 * element + 2 * 4))
    return most


def loss_temporary(model: ModelConfig, arguments: TrainArguments, layout: Layout, *, device: str) -> float:
    """Bytes that the loss needs besides what it keeps (`maskllm.megatron.loss`).

    These are the tensors of one chunk of vocabulary logits: fp32 and, if the weights are not, again their dtype; with soft-capping also
    the slope. With a teacher they are the logits and exponentials of both. The chunk's part of the gradient of the hidden states or of a
    trained output matrix comes last. In the backward pass, the output matrix's gradient is scaled and converted.
    """
    shapes = Shapes(model, layout.tensor)
    vocabulary, element = shapes.vocabulary, FLOAT_BYTES[arguments.params_dtype]
    in_bf16 = arguments.params_dtype == "bf16"
    is_capped = model.logit_softcap is not None
    most = after = 4 * (1 + is_capped) + (element if in_bf16 else 0)
    chunk = MAX_CHUNK_LOGITS // vocabulary
    if arguments.kl_loss_coeff:
        tensors = 4 + is_capped + (arguments.kl_temperature != 1)
        most = 4 * tensors
        after += 2 * 4  # the teacher's logits and the divergence's gradient, when the output matrix's gradient is computed
        chunk = 2 * MAX_CHUNK_LOGITS // vocabulary // tensors
    tokens = min(arguments.seq_length * arguments.micro_batch_size, max(1, chunk))
    product = tokens * model.hidden_size * element  # the gradients of the hidden states
    scaled = 0.0
    if arguments.train_embeddings:
        product = max(product, shapes.output_matrix * (element + (4 if in_bf16 and device == "cpu" else 0)))
        scaled = shapes.output_matrix * (4 + (element if in_bf16 else 0))
    return max(tokens * vocabulary * most, tokens * vocabulary * after + product, scaled)


def optimizer_temporary(shapes: Shapes, arguments: TrainArguments) -> float:
    """Bytes that the optimizer needs during its step."""
    weights = max(shapes.masked.values())
    largest = shapes.logits(weights, arguments)
    if arguments.low_precision:
        # Seven 4-byte numbers per entry: gradient, two moments, update, random number, and two intermediates of the rounding.
        return 28 * min(largest, CHUNK)
    if arguments.trains_weights:
        largest = max(largest, weights, shapes.output_matrix if arguments.train_embeddings else 0.0)
    # Without Transformer Engine and Apex, Megatron's clipping scales a copy of one gradient at a time. Masters take the fp32 gradients
    # of the step without a copy.
    clipping = 4 * largest
    if not arguments.uses_cast:
        return clipping
    # A refresh sorts the magnitudes of a weight: they, and their order in 8-byte numbers. A step has a mask, and chunks of fp32.
    refresh = weights * (2 * FLOAT_BYTES[arguments.params_dtype] + 8 + 1)
    return max(clipping, refresh, 3 * weights + 12 * min(weights, CHUNK))


def sequence_split(arguments: TrainArguments, layout: Layout) -> int:
    """The number of parts into which sequence parallelism splits the activations between the linears."""
    return layout.tensor if arguments.sequence_parallel else 1
