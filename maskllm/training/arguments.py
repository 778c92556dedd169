"""The options of training: one dataclass with the defaults. `maskllm.cli.train_options` makes the command line from it.

A flag with the meaning of a Megatron-LM flag has its name and default. The defaults for optimizer, batch and sequence are those of the
paper's single-node recipe (MaskLLM, arXiv 2409.17481, appendix).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from maskllm.data.dataset_files import dataset_files
from maskllm.dtypes import BY_FLAG, COMPUTE
from maskllm.environment.optional_parts import TRANSFORMER_IMPLS, resolve_transformer_impl
from maskllm.errors import MaskLLMError, flag
from maskllm.masking.schedules import AnnealingSchedule
from maskllm.patterns import Pattern


def _option(default: Any, help: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": help, **kwargs})


@dataclass
class TrainArguments:
    """All settings of `maskllm.train`."""

    data_path: list[str] = _option(
        (), "indexed-dataset prefixes to train on: P, or W1 P1 W2 P2 ... to blend", nargs="+", action="extend"
    )
    load: str | None = _option(None, "checkpoint to continue: a trained one is resumed exactly, any other starts a new run")
    pretrained_checkpoint: str | None = _option(
        None, "checkpoint to start from while --load holds none, so that one command both starts and resumes a run"
    )
    save: str | None = _option(None, "directory to write checkpoints and metrics.jsonl to")
    save_interval: int | None = _option(None, "steps between checkpoints; the run always writes one at its end and on SIGTERM")
    async_save: bool = _option(
        False, "write checkpoints in the background; a checkpoint becomes the latest when all of it is on disk"
    )
    keep_last: int | None = _option(
        None, "checkpoints to keep: older ones are removed after each save, but never the one that was loaded; default: all"
    )
    auto_fallback: bool = _option(False, "if a checkpoint is damaged, continue from the newest older one that is intact")
    split: str = _option("969,30,1", "shares of the documents for training, validation and test, in any unit")

    pattern: str = _option(
        "2:4",
        "with --train masks or both, or --weights-optimizer cast: N:M, keep N of every M consecutive weights; M at most 32, and at most "
        "128 candidate masks",
    )
    gumbel_temperature_range: tuple[float, float] = _option(
        AnnealingSchedule.temperature_range, "softmax temperature, first and last", nargs=2
    )
    gumbel_scale_range: tuple[float, float] = _option(
        AnnealingSchedule.scale_range, "multiplier of the logits, first and last", nargs=2
    )
    prior_strength: float = _option(3.0, "how far a prior mask moves the initial logits, in their standard deviations")
    weight_reg: float = _option(
        AnnealingSchedule.weight_reg, "weight of the sparse weight regularization; it decays linearly to zero"
    )
    mask_sample_interval: str = _option(
        "micro-batch",
        "how often masks are drawn: for each micro-batch of each data-parallel rank, or once a step for the whole job",
        choices=["micro-batch", "step"],
    )
    hard: bool = _option(False, "use the arg-max of each draw in the forward pass (straight-through gradient)")

    train: str = _option(
        "masks",
        "what is trained: the masks, with frozen weights; the weights that a fixed mask keeps; or both at once",
        choices=["masks", "weights", "both"],
    )
    weights_lr: float = _option(2e-5, "highest learning rate of the weights, with --train weights or both")
    weights_min_lr: float = _option(0.0, "learning rate of the weights at the end")
    weights_weight_decay: float = _option(0.0, "decoupled weight decay of the weights; norms and biases have none")
    weights_start_iter: int = _option(
        0, "with --train both: the step from which on the weights move; before it only the masks learn"
    )
    weights_optimizer: str = _option(
        "adam",
        "with --train weights: adam trains the weights that the checkpoint's mask keeps; cast trains a dense checkpoint toward its mask "
        "by magnitude (CAST, arXiv 2509.25996)",
        choices=["adam", "cast"],
    )
    mask_refresh_interval: int = _option(10, "with cast: steps between new masks by magnitude")
    l1_decay_coeff: float = _option(
        4e-7, "with cast: strength of the decay outside of the mask at the end of the run, about as large as a weight's gradient"
    )
    train_embeddings: bool = _option(False, "with --train weights or both: train the embedding and the output layer too")

    ce_loss_coeff: float | None = _option(None, "weight of the cross-entropy with the text; default: 1, and 2/3 with cast")
    kl_loss_coeff: float | None = _option(
        None, "weight of the divergence from the teacher's predictions, T^2 * KL(teacher || student); default: 0, and 1/3 with cast"
    )
    kl_temperature: float = _option(1.0, "temperature T of both predictions in that divergence")
    squarehead_loss_coeff: float = _option(
        0.0, "weight of SquareHead: the relative squared error of the hidden states after each layer, summed over the layers"
    )
    teacher: str | None = _option(
        None,
        "checkpoint of the teacher, dense and of the same shape; default: the dense weights that the run starts from",
    )

    train_iters: int = _option(2000, "optimizer steps")
    micro_batch_size: int = _option(1, "sequences a forward pass")
    global_batch_size: int = _option(256, "sequences a step, over all data-parallel ranks")
    seq_length: int = _option(4096, "tokens a sequence")
    lr: float = _option(5e-5, "highest learning rate of the logits")
    min_lr: float = _option(5e-6, "learning rate at the end")
    lr_decay_style: str = _option("cosine", "how the learning rate decays", choices=["constant", "linear", "cosine"])
    lr_warmup_iters: int = _option(0, "steps of linear warm-up")
    weight_decay: float = _option(0.1, "decoupled weight decay of the logits")
    adam_beta1: float = _option(0.9, "Adam's first moment's decay")
    adam_beta2: float = _option(0.95, "Adam's second moment's decay")
    adam_eps: float | None = _option(None, "Adam's epsilon; default: 1e-5, and 1e-8 with cast")
    clip_grad: float = _option(1.0, "clip the gradient to this norm; 0: do not clip")
    max_bad_steps: int = _option(
        10,
        "end the run after this many steps in a row with a loss or gradient that is not finite, and save the last batch to --save; "
        "each such step is skipped",
    )
    seed: int = _option(1234, "seed of the masks' noise, the initial logits and the data order")

    mask_logits_dtype: str = _option(
        "fp32", "dtype of the logits and their gradients; bf16 logits are rounded stochastically", choices=COMPUTE
    )
    optimizer_state_dtype: str = _option(
        "fp32", "dtype of Adam's moments; 8bit has one scale for every 256 entries", choices=["fp32", "bf16", "8bit"]
    )

    tensor_model_parallel_size: int = _option(1, "ranks that share each layer")
    pipeline_model_parallel_size: int = _option(1, "ranks that the layers are divided among")
    sequence_parallel: bool = _option(False, "also split the activations outside of the linears, along the sequence")
    use_distributed_optimizer: bool = _option(False, "split optimizer states over data-parallel ranks")
    distributed_timeout_minutes: float = _option(
        10, "minutes without progress after which the job ends and names the rank that hangs; may be a fraction"
    )
    transformer_impl: str | None = _option(
        None,
        "norms and attention: transformer_engine, or local, which is torch's attention with Apex's norms (torch's without Apex); default: "
        "transformer_engine if it can be used, else local",
        choices=TRANSFORMER_IMPLS,
    )
    recompute_granularity: str | None = _option(
        None,
        "what to recompute in the backward pass instead of keeping it: whole layers, or the --recompute-modules",
        choices=["full", "selective"],
    )
    recompute_method: str | None = _option(
        None,
        "with full: uniform keeps the input of each group of --recompute-num-layers layers, block recomputes only that many layers",
        choices=["uniform", "block"],
    )
    recompute_num_layers: int | None = _option(
        None, "with full: layers in a group (uniform), or layers of each pipeline stage (block)"
    )
    recompute_modules: list[str] = _option(
        ("core_attn",),
        "with selective: what to recompute; masked_weight is the weight times its mask: cheap to recompute, and as large as the weight",
        nargs="+",
        choices=["core_attn", "mlp", "masked_weight"],
    )
    params_dtype: str = _option(
        "bf16", "dtype of the weights and of the computation; weights that are trained also have fp32 masters", choices=COMPUTE
    )

    eval_interval: int = _option(1000, "steps between validations")
    eval_iters: int = _option(100, "batches in a validation, always the same ones; 0 for none")
    log_interval: int = _option(1, "steps between lines of the log; a line covers the steps since the one before")
    tensorboard_dir: str | None = _option(None, "directory for TensorBoard events")

    def __post_init__(self) -> None:
        if self.adam_eps is None:
            self.adam_eps = 1e-8 if self.uses_cast else 1e-5
        if self.ce_loss_coeff is None:
            self.ce_loss_coeff = 2 / 3 if self.uses_cast else 1.0
        if self.kl_loss_coeff is None:
            self.kl_loss_coeff = 1 / 3 if self.uses_cast else 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The torch type that `params_dtype` names."""
        return BY_FLAG[self.params_dtype]

    @property
    def logits_dtype(self) -> torch.dtype:
        """The torch type that `mask_logits_dtype` names."""
        return BY_FLAG[self.mask_logits_dtype]

    @property
    def low_precision(self) -> bool:
        """Whether logits or moments have fewer bits than fp32, which needs this project's optimizer (`LogitsAdam`)."""
        return (self.mask_logits_dtype, self.optimizer_state_dtype) != ("fp32", "fp32")

    @property
    def trains_masks(self) -> bool:
        """Whether masks are learned."""
        return self.train != "weights"

    @property
    def trains_weights(self) -> bool:
        """Whether weights are trained."""
        return self.train != "masks"

    @property
    def uses_cast(self) -> bool:
        """Whether a dense model is trained toward its mask by magnitude."""
        return self.weights_optimizer == "cast"

    @property
    def chooses_masks(self) -> bool:
        """Whether the run decides which masks it ends with, rather than keeping its start's."""
        return self.trains_masks or self.uses_cast

    @property
    def distills(self) -> bool:
        """Whether the loss has a term that needs the teacher."""
        return self.kl_loss_coeff > 0 or self.squarehead_loss_coeff > 0

    @property
    def has_separate_teacher(self) -> bool:
        """Whether the teacher is a second model. Otherwise it is the student's own frozen weights without their masks."""
        return self.distills and (self.trains_weights or self.teacher is not None)

    def idle_settings(self) -> dict[str, str]:
        """The settings that decide nothing in this run, each with what it needs."""
        needs = (
            ("--train masks or --train both", self.trains_masks, _OF_MASKS),
            ("--train weights or --train both", self.trains_weights, _OF_WEIGHTS),
            ("--train both", self.trains_masks and self.trains_weights, ("weights_start_iter",)),
            ("--weights-optimizer cast", self.uses_cast, ("mask_refresh_interval", "l1_decay_coeff")),
            ("--kl-loss-coeff above 0", self.kl_loss_coeff > 0, ("kl_temperature",)),
            ("--kl-loss-coeff or --squarehead-loss-coeff above 0", self.distills, ("teacher",)),
        )
        return {name: wanted for wanted, holds, names in needs if not holds for name in names}

    def check(self) -> Pattern:
        """Raise MaskLLMError for values that cannot work, whatever the number of ranks; returns the pattern."""
        if not self.data_path:
            raise MaskLLMError("--data-path: wanted at least one indexed-dataset prefix (make one with `maskllm preprocess`)")
        if self.load is None and self.pretrained_checkpoint is None:
            raise MaskLLMError("--load: wanted a checkpoint to start from (make one with `maskllm convert` and `maskllm prune`)")
        if self.save_interval is not None and (self.save_interval < 1 or self.save is None):
            raise MaskLLMError("--save-interval: wanted a positive number of steps, and --save")
        if self.keep_last is not None and self.keep_last < 1:
            raise MaskLLMError(f"--keep-last: found {self.keep_last}, wanted at least 1")
        resolve_transformer_impl(self.transformer_impl)
        return self.check_settings()

    def check_settings(self) -> Pattern:
        """`check`, except for the files that are read or written and for installed libraries."""
        pattern = Pattern.parse(self.pattern)
        pattern.require_learnable()
        for wanted, holds, names in _RANGES:
            for name in names:
                found = getattr(self, name)
                values = found if isinstance(found, tuple) else (found,)
                if not all(math.isfinite(value) and holds(value) for value in values):
                    raise MaskLLMError(f"{flag(name)}: found {' '.join(map(str, values))}, wanted {wanted}")
        if self.min_lr > self.lr:
            raise MaskLLMError(f"--min-lr {self.min_lr}: wanted at most --lr {self.lr}")
        if self.lr_warmup_iters >= self.train_iters:
            raise MaskLLMError(f"--lr-warmup-iters {self.lr_warmup_iters}: wanted fewer than --train-iters {self.train_iters}")
        if self.use_distributed_optimizer and self.low_precision:
            name = "mask_logits_dtype" if self.mask_logits_dtype != "fp32" else "optimizer_state_dtype"
            raise MaskLLMError(
                f"{flag(name)} {getattr(self, name)}: Megatron's distributed optimizer keeps fp32; leave out --use-distributed-optimizer"
            )
        self._check_trained()
        self._check_split()
        self._check_recomputation()
        if self.sequence_parallel and self.seq_length % self.tensor_model_parallel_size:
            raise MaskLLMError(
                f"--seq-length {self.seq_length}: with --sequence-parallel wanted a multiple of --tensor-model-parallel-size "
                f"{self.tensor_model_parallel_size}"
            )
        return pattern

    def _check_trained(self) -> None:
        """Raise MaskLLMError if what is trained, and against what, contradicts other settings."""
        if self.uses_cast and self.train != "weights":
            raise MaskLLMError(
                f"--weights-optimizer cast: wanted --train weights, found --train {self.train}; CAST finds its masks itself"
            )
        for name, wanted in self.idle_settings().items():
            if getattr(self, name) != getattr(TrainArguments, name):
                instead = f"weights_{name}"
                hint = f"; {flag(instead)} is the weights'" if hasattr(TrainArguments, instead) else ""
                raise MaskLLMError(f"{flag(name)}: wanted only with {wanted}{hint}")
        if self.trains_weights and self.weights_start_iter >= self.train_iters:
            raise MaskLLMError(
                f"--weights-start-iter {self.weights_start_iter}: wanted fewer than --train-iters {self.train_iters}"
            )
        if self.trains_weights and self.low_precision:
            name = "mask_logits_dtype" if self.mask_logits_dtype != "fp32" else "optimizer_state_dtype"
            raise MaskLLMError(
                f"{flag(name)} {getattr(self, name)}: only --train masks has it; --train {self.train} keeps fp32 masters and moments"
            )
        if self.uses_cast and 10 * self.adam_eps > self.l1_decay_coeff:
            raise MaskLLMError(
                f"--adam-eps {self.adam_eps}: with --weights-optimizer cast wanted at most a tenth of --l1-decay-coeff "
                f"{self.l1_decay_coeff}, such as 1e-8; a larger one outweighs the decay, and no weight gets to zero"
            )
        if self.trains_weights and self.adam_eps == 0:
            raise MaskLLMError(
                f"--adam-eps 0: with --train {self.train} wanted a positive number; without one, a weight that gets no gradient becomes NaN"
            )
        if self.weights_min_lr > self.weights_lr:
            raise MaskLLMError(f"--weights-min-lr {self.weights_min_lr}: wanted at most --weights-lr {self.weights_lr}")
        if not (self.ce_loss_coeff or self.distills):
            raise MaskLLMError(
                "--ce-loss-coeff 0: nothing is minimized; wanted it, --kl-loss-coeff or --squarehead-loss-coeff above 0"
            )

    def _check_split(self) -> None:
        """Raise MaskLLMError if `split` is not a list of shares; upstream would pick the digits out of any text."""
        try:
            shares = [float(share) for share in self.split.split(",")]
        except ValueError:
            shares = []
        if not 1 <= len(shares) <= 3 or not all(0 <= share < math.inf for share in shares) or not sum(shares):
            raise MaskLLMError(f"--split {self.split}: wanted up to three shares, training, validation and test, such as 969,30,1")

    def _check_recomputation(self) -> None:
        given = [name for name in ("recompute_method", "recompute_num_layers") if getattr(self, name) is not None]
        if self.recompute_granularity == "full" and len(given) < 2:
            raise MaskLLMError("--recompute-granularity full: wanted --recompute-method and --recompute-num-layers too")
        if self.recompute_granularity != "full" and given:
            raise MaskLLMError(f"{flag(given[0])}: wanted only with --recompute-granularity full")
        if self.recompute_granularity != "selective" and tuple(self.recompute_modules) != ("core_attn",):
            raise MaskLLMError("--recompute-modules: wanted only with --recompute-granularity selective")
        if self.recompute_num_layers is not None and self.recompute_num_layers < 1:
            raise MaskLLMError(f"--recompute-num-layers: found {self.recompute_num_layers}, wanted at least 1")

    def recomputes(self, module: str) -> bool:
        """Whether selective recomputation includes `module`, one of --recompute-modules."""
        return self.recompute_granularity == "selective" and module in self.recompute_modules

    def recomputation(self) -> dict[str, Any]:
        """The fields of Megatron's `TransformerConfig` that say what is recomputed."""
        if self.recompute_granularity is None:
            return {}
        return {
            "recompute_granularity": self.recompute_granularity,
            "recompute_method": self.recompute_method,
            "recompute_num_layers": self.recompute_num_layers,
            "recompute_modules": [name for name in self.recompute_modules if name != "masked_weight"],
        }

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Micro-batches a step on each data-parallel rank. Raises MaskLLMError if the global batch does not divide evenly."""
        per_pass = self.micro_batch_size * data_parallel_size
        if self.global_batch_size % per_pass:
            raise MaskLLMError(
                f"--global-batch-size {self.global_batch_size}: wanted a multiple of --micro-batch-size {self.micro_batch_size} x "
                f"{data_parallel_size} data-parallel ranks"
            )
        return self.global_batch_size // per_pass

    def blend(self) -> tuple[list[str], list[float] | None]:
        """`data_path` as Megatron Core's (prefixes, weights). Raises MaskLLMError for a half-given blend or a missing file."""
        prefixes, weights = list(self.data_path), None
        if len(prefixes) > 1:
            if len(prefixes) % 2:
                raise MaskLLMError(f"--data-path: found {len(prefixes)} values, wanted W1 P1 W2 P2 ...")
            try:
                weights = [float(weight) for weight in prefixes[::2]]
            except ValueError as error:
                raise MaskLLMError(f"--data-path: wanted W1 P1 W2 P2 ..., a number before each prefix ({error})") from None
            for weight in weights:
                if not 0 < weight < math.inf:
                    raise MaskLLMError(f"--data-path: found the weight {weight}, wanted positive numbers")
            prefixes = prefixes[1::2]
            if len(prefixes) == 1:
                weights = None  # upstream would deal out the same data in another order
        for prefix in prefixes:
            for file in dataset_files(prefix):
                if not file.is_file():
                    raise MaskLLMError(f"--data-path: no file {file} (make it with `maskllm preprocess`)")
        return prefixes, weights


_OF_MASKS = (
    "lr", "min_lr", "weight_decay", "gumbel_temperature_range", "gumbel_scale_range", "prior_strength", "weight_reg",
    "mask_sample_interval", "hard",
)  # fmt: skip
_OF_WEIGHTS = ("weights_lr", "weights_min_lr", "weights_weight_decay", "train_embeddings")

_RANGES = (
    (
        "at least 1",
        lambda value: value >= 1,
        (
            "train_iters", "micro_batch_size", "global_batch_size", "seq_length", "log_interval", "eval_interval",
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "max_bad_steps", "mask_refresh_interval",
        ),
    ),
    ("positive numbers", lambda value: value > 0, ("gumbel_temperature_range", "gumbel_scale_range")),
    ("a positive number", lambda value: value > 0, ("lr", "weights_lr", "kl_temperature", "distributed_timeout_minutes", "l1_decay_coeff")),
    (
        "at least 0",
        lambda value: value >= 0,
        (
            "eval_iters", "lr_warmup_iters", "min_lr", "weight_decay", "adam_eps", "clip_grad", "prior_strength", "weight_reg",
            "weights_min_lr", "weights_weight_decay", "weights_start_iter", "ce_loss_coeff", "kl_loss_coeff", "squarehead_loss_coeff",
        ),
    ),
    ("at least 0 and less than 1", lambda value: 0 <= value < 1, ("adam_beta1", "adam_beta2")),
    ("at least 0 and less than 2^32", lambda value: 0 <= value < 1 << 32, ("seed",)),
)  # fmt: skip
"""What `TrainArguments.check` wants of each number: in words, as a predicate, and which they are."""
