"""The arguments of a sparse training: those of transformers' `Trainer`, and what the masks and the teacher add."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from maskllm.errors import MaskLLMError
from maskllm.masking.schedules import AnnealingSchedule


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the settings of mask learning and distillation; `maskllm.training.arguments` has the same ones.

    `learning_rate` and `weight_decay` are those of what is trained: of the logits while masks are learned, else of the weights.
    If both are trained, `max_grad_norm` clips logits and weights each by its own norm. Raises MaskLLMError if a value cannot work.
    """

    ce_loss_coeff: float = field(
        default=1.0, metadata={"help": "weight of the model's own loss, the cross-entropy with the labels"}
    )
    kl_loss_coeff: float = field(
        default=0.0, metadata={"help": "weight of the divergence from the teacher's predictions, T^2 * KL(teacher || student)"}
    )
    kl_temperature: float = field(default=1.0, metadata={"help": "temperature T of both predictions in that divergence"})
    squarehead_loss_coeff: float = field(
        default=0.0,
        metadata={
            "help": "weight of SquareHead: the relative squared error of the hidden states after each block, summed over the blocks"
        },
    )
    weights_learning_rate: float = field(
        default=2e-5, metadata={"help": "highest learning rate of the weights if masks are learned too"}
    )
    weights_weight_decay: float = field(
        default=0.0, metadata={"help": "decoupled weight decay of the weights if masks are learned too; norms and biases have none"}
    )
    gumbel_temperature_range: list[float] = field(
        default_factory=lambda: list(AnnealingSchedule.temperature_range), metadata={"help": "softmax temperature, first and last"}
    )
    gumbel_scale_range: list[float] = field(
        default_factory=lambda: list(AnnealingSchedule.scale_range), metadata={"help": "multiplier of the logits, first and last"}
    )
    weight_reg: float = field(
        default=AnnealingSchedule.weight_reg,
        metadata={"help": "weight of the sparse weight regularization; it decays linearly to zero"},
    )
    hard: bool = field(
        default=False, metadata={"help": "use the arg-max of each draw in the forward pass (straight-through gradient)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for wanted, holds, names in _RANGES:
            for name in names:
                found = getattr(self, name)
                values = found if isinstance(found, list) else [found]
                if not all(math.isfinite(value) and holds(value) for value in values):
                    raise MaskLLMError(f"{name}: found {' '.join(map(str, values))}, wanted {wanted}")
        for name in ("gumbel_temperature_range", "gumbel_scale_range"):
            if len(getattr(self, name)) != 2:
                raise MaskLLMError(f"{name}: found {getattr(self, name)}, wanted the first and the last value")
        if not (self.ce_loss_coeff or self.distills):
            raise MaskLLMError("ce_loss_coeff 0: nothing is minimized; wanted it, kl_loss_coeff or squarehead_loss_coeff above 0")

    @property
    def distills(self) -> bool:
        """Whether the loss has a term that needs a teacher."""
        return self.kl_loss_coeff > 0 or self.squarehead_loss_coeff > 0


_RANGES = (
    ("positive numbers", lambda value: value > 0, ("gumbel_temperature_range", "gumbel_scale_range")),
    ("a positive number", lambda value: value > 0, ("kl_temperature", "weights_learning_rate")),
    (
        "at least 0",
        lambda value: value >= 0,
        ("ce_loss_coeff", "kl_loss_coeff", "squarehead_loss_coeff", "weights_weight_decay", "weight_reg"),
    ),
)
"""What is wanted of each number: in words, as a predicate, and which they are."""
