"""Where a run starts from: which checkpoint, and whether it continues an earlier run with the same settings and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from maskllm.checkpoints.checksums import FileRecord
from maskllm.checkpoints.finding import holds_checkpoint, iterations
from maskllm.checkpoints.info import TRAINED_WEIGHTS
from maskllm.checkpoints.reading import Checkpoint, open_iteration, resolve
from maskllm.data.dataset_files import dataset_files
from maskllm.distributed import from_first_rank, is_first_rank, raised_together
from maskllm.dtypes import dtype_name
from maskllm.errors import MaskLLMError, flag
from maskllm.families.model_config import ModelConfig, check_context
from maskllm.families.registry import parameter_map
from maskllm.patterns import Pattern
from maskllm.training.arguments import TrainArguments

SETTINGS_THAT_MUST_MATCH = (
    "pattern",
    "seed",
    "train_iters",
    "global_batch_size",
    "micro_batch_size",
    "seq_length",
    "hard",
    "prior_strength",
    "mask_sample_interval",
    "gumbel_temperature_range",
    "gumbel_scale_range",
    "weight_reg",
    "use_distributed_optimizer",
    "mask_logits_dtype",
    "optimizer_state_dtype",
    "lr",
    "min_lr",
    "lr_decay_style",
    "lr_warmup_iters",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "clip_grad",
    "split",
    "train",
    "weights_lr",
    "weights_min_lr",
    "weights_weight_decay",
    "weights_start_iter",
    "train_embeddings",
    "ce_loss_coeff",
    "kl_loss_coeff",
    "kl_temperature",
    "squarehead_loss_coeff",
    "weights_optimizer",
    "mask_refresh_interval",
    "l1_decay_coeff",
)
"""Arguments that a resumed run must share with the run it continues, as it must share its data: all that decide what is learned. Those
that decide nothing in the run (`TrainArguments.idle_settings`) may differ.
Everything else (layout, precision of frozen weights, intervals, paths) may change. A run that an older version has written lacks the
settings that came later; it has their defaults. Megatron's two kinds of optimizer keep their state under different keys and cannot
load each other's."""

_ADDED_LATER = SETTINGS_THAT_MUST_MATCH[SETTINGS_THAT_MUST_MATCH.index("train") :]


@dataclass
class Start:
    """The checkpoint a run starts from."""

    arguments: TrainArguments
    checkpoint: Checkpoint
    resumed: bool
    """Whether training wrote the checkpoint and continues from it, rather than starting a new run from it."""
    data: list[dict[str, Any]]
    """What identifies the run's data: see `data_identity`."""
    teacher: Checkpoint | None = None
    """The teacher; None if there is none, or if it is the student's own frozen weights without their masks."""
    details: dict[str, Any] = field(default_factory=dict)
    """What the run's checkpoints say in `maskllm.json` of the teacher and of trained weights: see `_details`."""

    @property
    def iteration(self) -> int:
        """Steps already done."""
        return int(self.checkpoint.iteration) if self.resumed else 0

    @property
    def lies_in_save(self) -> bool:
        """Whether the checkpoint is one of those in `--save`, directly or through a link."""
        save, path = self.arguments.save, self.checkpoint.path
        return save is not None and Path(save).resolve() in (path.parent.resolve(), path.resolve().parent)

    @property
    def model_config(self) -> ModelConfig:
        """The architecture."""
        return self.checkpoint.model_config


def resolve_start(arguments: TrainArguments, pattern: Pattern, *, say: Callable[[str], None] = lambda _: None) -> Start:
    """Open `--load` or, while that directory holds no checkpoint yet, `--pretrained-checkpoint`, and verify its files' checksums.

    All ranks of the job call this. `say` gets a line about each checkpoint that is passed over. Raises MaskLLMError if

    * a file is damaged and there is no `--auto-fallback`, or no older checkpoint to fall back to;
    * the checkpoint's pattern, or a setting or the data of the run it continues, contradicts the arguments;
    * sequences are longer than the model's context;
    * `--save` holds another run.
    """
    path = arguments.load
    if arguments.pretrained_checkpoint is not None and (path is None or not from_first_rank(holds_checkpoint(path))):
        path = arguments.pretrained_checkpoint
    checkpoint = _open_intact(path, fall_back=arguments.auto_fallback, say=say)
    resumed = _trained_by(checkpoint) == arguments.train
    _check_can_start(checkpoint, arguments, pattern)
    data: list[dict[str, Any]] = []
    with raised_together():
        if is_first_rank():
            data = data_identity(arguments)
    start = Start(arguments, checkpoint, resumed, from_first_rank(data))
    if start.resumed:
        _check_same_run(start)
    start.teacher = _find_teacher(start, say)
    start.details = _details(start)
    if arguments.save is not None and from_first_rank(
        holds_checkpoint(arguments.save) and not (start.resumed and start.lies_in_save)
    ):
        if start.lies_in_save:
            raise MaskLLMError(f"--save {arguments.save}: holds the checkpoint that the run starts from; name another --save")
        raise MaskLLMError(
            f"--save {arguments.save}: holds a run; go on with it by --load {arguments.save}, or name another --save"
        )
    return start


def _open_intact(path: str, *, fall_back: bool, say: Callable[[str], None]) -> Checkpoint:
    """The first of `iterations(path)`, its checksums verified; with `fall_back` the first that is intact."""
    found: list[str] = []
    with raised_together():  # the first rank decides: another machine may not see the newest directory yet
        if is_first_rank():
            found = [str(candidate) for candidate in iterations(path, fall_back=fall_back, say=say)]
    candidates = [Path(candidate) for candidate in from_first_rank(found)]
    for candidate, older in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            with raised_together():
                checkpoint = open_iteration(candidate)
            checkpoint.verify()
            return checkpoint
        except MaskLLMError as error:
            if older is None:
                raise
            if not fall_back:
                raise MaskLLMError(f"{error} (--auto-fallback goes on from {older.name})") from None
            say(f"{error}; --auto-fallback: going on from {older.name}")
    raise AssertionError("iterations() gives at least one")


def _check_can_start(checkpoint: Checkpoint, arguments: TrainArguments, pattern: Pattern) -> None:
    """Raise MaskLLMError if what `--train` names cannot be trained from this checkpoint."""
    info, before = checkpoint.info, _trained_by(checkpoint)
    check_context(arguments.seq_length, checkpoint.model_config.context)
    if arguments.uses_cast:
        if info.stage != "dense" and before != "weights":
            raise MaskLLMError(
                f"{checkpoint.path}: is a {info.stage} checkpoint; --weights-optimizer cast starts from a dense one, because it takes its "
                "masks from the magnitudes of the weights; name what `maskllm convert` wrote"
            )
    elif arguments.train == "weights":
        if info.stage == "dense":
            raise MaskLLMError(
                f"{checkpoint.path}: is a dense checkpoint, which has no masks to train the weights under; give it masks first, with "
                "`maskllm prune` or --train masks"
            )
        if before == "both":
            raise MaskLLMError(
                f"{checkpoint.path}: its run had --train both, and its optimizer holds the weights in all their bits; start "
                "--train weights from what `maskllm trim` makes of it, or resume it with --train both"
            )
    # Fixed masks may have any pattern; then only a --pattern that somebody has given can contradict them.
    matters = arguments.chooses_masks or arguments.pattern != TrainArguments.pattern
    if matters and info.pattern not in (None, str(pattern)):
        raise MaskLLMError(f"{checkpoint.path}: its masks have pattern {info.pattern}; --pattern is {pattern}")
    if not arguments.chooses_masks:
        return
    if before not in (None, "masks", arguments.train):
        raise MaskLLMError(
            f"{checkpoint.path}: its run had --train {before}, whose weights are no longer the original's; --train {arguments.train} "
            f"cannot start from them; resume it with --train {before}, or start from an earlier checkpoint"
        )
    if info.stage == "trimmed":
        raise MaskLLMError(
            f"{checkpoint.path}: a trimmed checkpoint's weights have their zeros written in; start from the pruned one"
        )
    if info.stage == "pruned" and info.details.get("update_weights"):
        raise MaskLLMError(
            f"{checkpoint.path}: its weights have zeros written in (--update-weights or --least-squares), which no mask can bring back; "
            "start from one pruned without them"
        )


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of the run that wrote a trained checkpoint; those that its version lacked have their defaults."""
    stored = checkpoint.info.details.get("settings")
    defaults = settings_of(TrainArguments())
    return {**{name: defaults[name] for name in _ADDED_LATER}, **(stored if isinstance(stored, dict) else {})}


def _trained_by(checkpoint: Checkpoint) -> str | None:
    """The `--train` of the run that wrote the checkpoint; None if no run did."""
    return _settings(checkpoint)["train"] if checkpoint.info.stage == "trained" else None


def _find_teacher(start: Start, say: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint of the teacher; None if there is none, or if it is the student's own frozen weights.

    It is `--teacher`, or else that of the resumed run, or else the dense weights that a new run starts from. All ranks call this.
    Raises MaskLLMError if there are none, or if it is another teacher than the resumed run's or has another shape than the student.
    """
    arguments = start.arguments
    if not arguments.distills:
        return None
    recorded = start.checkpoint.info.details.get("teacher") if start.resumed else None
    path = arguments.teacher
    if path is None and recorded is not None:
        path = recorded["path"]
    if path is None and not arguments.trains_weights:
        return None
    if path is None:
        checkpoint = start.checkpoint
    elif start.resumed and recorded is None:
        raise MaskLLMError(
            f"--teacher {path}: the run in {start.checkpoint.path} learns from its own weights without their masks; leave it out"
        )
    else:
        try:
            with raised_together():
                checkpoint = resolve(path)
            checkpoint.verify()
        except MaskLLMError as error:
            if arguments.teacher is not None:
                raise MaskLLMError(f"--teacher: {error}") from None
            raise MaskLLMError(
                f"{error}; it is the teacher of the run in {start.checkpoint.path}: if it has moved, name it by --teacher"
            ) from None
    info, option = checkpoint.info, f"--teacher {checkpoint.path}"
    is_dense = info.stage == "dense" or (info.stage == "pruned" and not info.details.get("update_weights"))
    if not is_dense and _trained_by(checkpoint) != "masks":
        raise MaskLLMError(
            f"{option}: its weights are not dense; a teacher is a dense checkpoint, such as `maskllm convert` writes; name it by --teacher"
        )
    if recorded is not None and checkpoint.manifest_digest() != recorded["manifest"]:
        raise MaskLLMError(f"{option}: is not the teacher of the run in {start.checkpoint.path}, {recorded['path']}; name that one")
    for name in ("num_layers", "hidden_size", "vocab_size", "logit_softcap"):
        ours, theirs = getattr(start.model_config, name), getattr(checkpoint.model_config, name)
        if ours != theirs:
            raise MaskLLMError(f"{option}: has {name} {theirs}; wanted the student's, {ours}")
    check_context(arguments.seq_length, checkpoint.model_config.context)
    say(f"learning from the teacher {checkpoint.path}")
    return checkpoint


def _details(start: Start) -> dict[str, Any]:
    """What `maskllm.json` says of the teacher, if it is a checkpoint, and of weights that are trained.

    `weights` says it in words. `weights_dtype` is the dtype of each tensor in the checkpoint that was first trained; it is one string if
    all are alike. All of it is read when the run starts, because the teacher's and the start's files may be gone when it saves.
    """
    details: dict[str, Any] = {}
    if start.teacher is not None:
        details["teacher"] = {"path": str(start.teacher.path.resolve()), "manifest": start.teacher.manifest_digest()}
    if not start.arguments.trains_weights:
        return details
    before = start.checkpoint.info.weights_dtype
    if before is None:
        tensors = start.checkpoint.tensors
        dtypes = {
            mapping.megatron: dtype_name(tensors[mapping.megatron].dtype)
            for mapping in parameter_map(start.checkpoint.model_config)
        }
        before = dtypes if len(set(dtypes.values())) > 1 else next(iter(dtypes.values()))
    return details | {"weights": TRAINED_WEIGHTS, "weights_dtype": before}


def _check_same_run(start: Start) -> None:
    """Raise MaskLLMError if settings or data are not those of the run that the checkpoint belongs to."""
    path, details = start.checkpoint.path, start.checkpoint.info.details
    before = _settings(start.checkpoint)
    if not before.keys() >= set(SETTINGS_THAT_MUST_MATCH):
        raise MaskLLMError(f"{path}: its maskllm.json lacks the settings of the run; it cannot be resumed")
    again = "or start a new run with another --load and --save"
    if not start.lies_in_save:  # the checkpoint of another run, which the same --train would always go on from
        trims = start.arguments.train == "weights"
        again = f"or start a new run from {'what `maskllm trim` makes of it' if trims else 'another checkpoint'}"
    idle = start.arguments.idle_settings()
    for name, now in settings_of(start.arguments).items():
        if name not in idle and before[name] != now:
            raise MaskLLMError(f"{flag(name)} {now}: the run in {path} has {before[name]}; resume with the same value, {again}")
    if details.get("data") != start.data:
        raise MaskLLMError(
            f"--data-path: these are not the data of the run in {path} (its datasets, in their order, with their weights, wherever they "
            f"lie); resume with the same data, {again}"
        )


def data_identity(arguments: TrainArguments) -> list[dict[str, Any]]:
    """What identifies the data: each dataset's weight and the checksum of its index, which holds every document's length.

    The paths are left out, so that the files may move.
    """
    prefixes, weights = arguments.blend()
    return [
        {"weight": weight, "idx": asdict(FileRecord.of(dataset_files(prefix)[1]))}
        for prefix, weight in zip(prefixes, weights or [1.0], strict=True)
    ]


def settings_of(arguments: TrainArguments) -> dict[str, Any]:
    """The arguments in SETTINGS_THAT_MUST_MATCH as JSON values; also the dtype of weights that have masters."""
    names = (*SETTINGS_THAT_MUST_MATCH, "params_dtype") if arguments.trains_weights else SETTINGS_THAT_MUST_MATCH
    values = {name: getattr(arguments, name) for name in names}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
