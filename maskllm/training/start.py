"""Where a run starts from: which checkpoint, and whether it continues an earlier run with the same settings and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from maskllm.checkpoints.checksums import FileRecord
from maskllm.checkpoints.finding import holds_checkpoint, iterations
from maskllm.checkpoints.reading import Checkpoint, open_iteration
from maskllm.data.dataset_files import dataset_files
from maskllm.distributed import from_first_rank, is_first_rank, raised_together
from maskllm.errors import MaskLLMError, flag
from maskllm.families.model_config import ModelConfig, check_context
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
)
"""Arguments that a resumed run must share with the run it continues, as it must share its data: all that decide what is learned.
Everything else (layout, precision of the frozen weights, intervals, paths) may change. Megatron's two kinds of optimizer keep their state
under different keys and cannot load each other's."""


@dataclass
class Start:
    """The checkpoint a run starts from."""

    arguments: TrainArguments
    checkpoint: Checkpoint
    resumed: bool
    """Whether training wrote the checkpoint and continues from it, rather than starting a new run from it."""
    data: list[dict[str, Any]]
    """What identifies the run's data: see `data_identity`."""

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
    _check_can_start(checkpoint, arguments, pattern)
    data: list[dict[str, Any]] = []
    with raised_together():
        if is_first_rank():
            data = data_identity(arguments)
    start = Start(arguments, checkpoint, checkpoint.info.stage == "trained", from_first_rank(data))
    if start.resumed:
        _check_same_run(start)
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
    """Raise MaskLLMError if masks with these arguments cannot be learned from this checkpoint."""
    info = checkpoint.info
    check_context(arguments.seq_length, checkpoint.model_config.context)
    if info.stage == "trimmed":
        raise MaskLLMError(
            f"{checkpoint.path}: a trimmed checkpoint's weights have their zeros written in; start from the pruned one"
        )
    if info.stage == "pruned" and info.details.get("update_weights"):
        raise MaskLLMError(
            f"{checkpoint.path}: its weights have zeros written in (--update-weights), which no mask can bring back; start from one "
            "pruned without it"
        )
    if info.pattern is not None and info.pattern != str(pattern):
        raise MaskLLMError(f"{checkpoint.path}: its masks have pattern {info.pattern}; --pattern is {pattern}")


def _check_same_run(start: Start) -> None:
    """Raise MaskLLMError if settings or data are not those of the run that the checkpoint belongs to."""
    path, details = start.checkpoint.path, start.checkpoint.info.details
    before = details.get("settings")
    if not isinstance(before, dict) or not before.keys() >= set(SETTINGS_THAT_MUST_MATCH):
        raise MaskLLMError(f"{path}: its maskllm.json lacks the settings of the run; it cannot be resumed")
    for name, now in settings_of(start.arguments).items():
        if before[name] != now:
            raise MaskLLMError(
                f"{flag(name)} {now}: the run in {path} has {before[name]}; resume with the same value, or start a new run with another "
                "--load and --save"
            )
    if details.get("data") != start.data:
        raise MaskLLMError(
            f"--data-path: these are not the data of the run in {path} (its datasets, in their order, with their weights, wherever they "
            "lie); resume with the same data, or start a new run with another --load and --save"
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
    """The arguments in SETTINGS_THAT_MUST_MATCH as JSON values."""
    values = {name: getattr(arguments, name) for name in SETTINGS_THAT_MUST_MATCH}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
