"""Training and validation batches, from Megatron Core's GPTDataset."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from maskllm.data.indexed import open_indexed
from maskllm.distributed import from_first_rank, is_first_rank, wait_for_all_ranks
from maskllm.errors import MaskLLMError
from maskllm.files import publish_directory
from maskllm.models.manifest import FileRecord
from maskllm.training.arguments import TrainArguments


@dataclass(frozen=True)
class _Tokens:
    """The little that GPTDataset asks of a tokenizer when documents are tokenized already."""

    vocab_size: int
    eod: int = -1
    pad: int = -2

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size}


@dataclass(frozen=True)
class Batch:
    """A micro-batch, int64 [micro batch, sequence] each, on this rank's device."""

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor


class Batches:
    """Micro-batches by their global index: a function of the data, the seed and the index alone, so nothing needs saving.

    Micro-batch i holds samples i * micro_batch_size and on, as Megatron-LM's single-epoch sampler deals them out.
    """

    def __init__(self, dataset: GPTDataset, micro_batch_size: int, vocab_size: int, device: torch.device) -> None:
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.vocab_size = vocab_size
        self.device = device

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch `index`. Raises MaskLLMError where it cannot be read or a token is outside the model's vocabulary."""
        first = index * self.micro_batch_size
        try:
            samples = [self.dataset[first + i] for i in range(self.micro_batch_size)]
        except ValueError as error:  # an offset that lies outside of the .bin file
            raise MaskLLMError(f"--data-path: sample {first} and on cannot be read ({error}); the dataset is damaged") from None
        tokens, labels, position_ids = (
            torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "position_ids")
        )
        largest = int(torch.maximum(tokens.max(), labels.max()))
        if largest >= self.vocab_size:
            raise MaskLLMError(
                f"--data-path: found token {largest}, wanted less than the model's vocabulary of {self.vocab_size}; the dataset was "
                "made with another tokenizer"
            )
        return Batch(*(x.to(self.device, non_blocking=True) for x in (tokens, labels, position_ids)))


class DataFiles:
    """The dataset's files, watched: training reads them through memory maps, where what is gone is a signal and not an error."""

    def __init__(self, prefixes: list[str]) -> None:
        self.sizes = {path: path.stat().st_size for prefix in prefixes for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))}

    def problem(self) -> str | None:
        """One line about the first file that is gone or no longer what it was; None while all is well."""
        for path, size in self.sizes.items():
            try:
                found = path.stat().st_size
            except OSError as error:
                return f"--data-path: {path} has disappeared ({error.strerror}); put it back"
            if found != size:
                return f"--data-path: {path} has {found} bytes, it had {size} when the run started; put it back"
        return None


def data_identity(arguments: TrainArguments) -> list[dict[str, Any]]:
    """Of each dataset of the blend its weight and the checksum of its index, which has every document's length: its path may change."""
    prefixes, weights = arguments.blend()
    return [
        {"weight": weight, "idx": asdict(FileRecord.of(Path(f"{prefix}.idx")))}
        for prefix, weight in zip(prefixes, weights or [1.0], strict=True)
    ]


def build_batches(
    arguments: TrainArguments, identity: list[dict[str, Any]], vocab_size: int, device: torch.device
) -> tuple[Batches, Batches | None]:
    """The training batches and, with `eval_iters`, the validation batches (None without); called by all ranks.

    `identity` is the `data_identity` of the data. Raises MaskLLMError where the split leaves a part without a single document, and where
    the index files cannot be written or read.
    """
    samples = [arguments.train_iters * arguments.global_batch_size, arguments.eval_iters * arguments.global_batch_size, 0]
    config = GPTDatasetConfig(
        random_seed=arguments.seed,
        sequence_length=arguments.seq_length,
        blend=arguments.blend(),
        split=arguments.split,
        tokenizer=_Tokens(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    used = {0: "training", 1: "validation"} if arguments.eval_iters else {0: "training"}
    config.split_matrix = [bounds if part in used else None for part, bounds in enumerate(config.split_matrix)]
    for prefix in config.blend[0]:
        for part, name in used.items():
            _check_not_empty(prefix, config.split_matrix[part], name, arguments.split)
    directory = _index_directory(arguments, identity, samples)

    def build(index: Path) -> list[Any]:
        config.path_to_cache = str(index)
        return BlendedMegatronDatasetBuilder(GPTDataset, samples, lambda: True, config).build()

    _make_index(directory, build)
    with _reading_index(directory):
        train, valid, _ = build(directory)
    return (
        Batches(train, arguments.micro_batch_size, vocab_size, device),
        Batches(valid, arguments.micro_batch_size, vocab_size, device) if arguments.eval_iters else None,
    )


def _index_directory(arguments: TrainArguments, identity: list[dict[str, Any]], samples: list[int]) -> Path:
    """Where the index files are that deal out these data with these settings, and no others: upstream's own names for them, which go by
    the datasets' paths, would have those of other data taken for them."""
    prefixes, _ = arguments.blend()
    key = [prefixes, identity, samples, arguments.seed, arguments.seq_length, arguments.split, metadata.version("megatron-core")]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return Path(arguments.data_cache_path or f"{prefixes[0]}_index_cache") / digest[:32]


def _make_index(directory: Path, build: Callable[[Path], object]) -> None:
    """Have upstream, whose first rank writes while the others wait, make the index files, unless they are there; all appear or none."""
    # Other machines of a network file system remember for a while that they have not found it: they do not look before it is there.
    if from_first_rank(is_first_rank() and directory.is_dir()):
        return
    temporary = Path(from_first_rank(str(directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.tmp"))))
    try:
        build(temporary)
        wait_for_all_ranks()  # the others have read them
        if is_first_rank() and not directory.is_dir():
            publish_directory(temporary, directory)
    except Exception as error:
        cause = error.__cause__ if "Failed to write dataset materials" in str(error) else error
        if not isinstance(cause, OSError):
            raise
        raise MaskLLMError(
            f"--data-cache-path: the index files cannot be written in {directory.parent} ({cause.strerror}); name a directory with room"
        ) from None
    finally:
        if is_first_rank():
            shutil.rmtree(temporary, ignore_errors=True)
    wait_for_all_ranks()


@contextlib.contextmanager
def _reading_index(directory: Path) -> Iterator[None]:
    """A block that reads complete index files: what numpy says of damaged ones becomes a MaskLLMError."""
    try:
        yield
    except (ValueError, EOFError) as error:
        raise MaskLLMError(f"{directory}: the dataset's index files are damaged ({error}); remove this directory") from None


def _check_not_empty(prefix: str, bounds: tuple[float, float] | None, part: str, split: str) -> None:
    """Raise MaskLLMError where a part of the split has no token in a dataset; upstream would look for its samples for ever."""
    dataset = open_indexed(prefix)  # its lengths lie in memory that is mapped for as long as it lives
    lengths = dataset.sequence_lengths
    first, last = (round(bound * float(len(lengths))) for bound in bounds) if bounds else (0, 0)
    if not lengths[first:last].any():
        advice = "change it, or set --eval-iters 0" if part == "validation" else "change it"
        raise MaskLLMError(f"--split {split}: leaves no text for {part} in {prefix}, which has {len(lengths)} documents; {advice}")
