"""What a checkpoint says of itself: `maskllm.json`.

{"format_version": 1, "stage": "pruned", "source": "meta-llama/Llama-2-7b-hf", "pattern": "2:4", "method": "sparsegpt",
 "details": {...}}
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskllm.errors import MaskLLMError
from maskllm.files import read_json_object, write_json
from maskllm.patterns import Pattern

FORMAT_VERSION = 1
INFO = "maskllm.json"
UNSTRUCTURED = "unstructured"
"""The pattern of one-shot masks that follow no N:M pattern."""
TRAINED_WEIGHTS = "trained: they are not the original's, and a mask file alone does not make this model"
"""`details["weights"]` if the weights were trained."""
STAGES = ("dense", "pruned", "trained", "trimmed")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint's tensors are."""

    stage: str
    """dense: weights as converted; pruned: also `mask_bits`; trained: also `mask_logits`, or fixed `mask_bits` and trained weights;
    trimmed: `mask_bits` and zeros in the weights."""
    source: str
    """The Hugging Face directory or hub id that was converted."""
    pattern: str | None = None
    """N:M or UNSTRUCTURED; None for a dense checkpoint."""
    method: str | None = None
    """How the one-shot mask in `mask_bits` was made; None if there is no such mask."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further facts from the command that wrote it, for people and reports."""

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise MaskLLMError(f"checkpoint stage {self.stage!r}; wanted one of {', '.join(STAGES)}")
        if not isinstance(self.details, dict):
            raise MaskLLMError(f"details {self.details!r}; wanted a JSON object")
        if self.pattern is not None and not isinstance(self.pattern, str):
            raise MaskLLMError(f"pattern {self.pattern!r}; wanted N:M or {UNSTRUCTURED}")
        if (self.pattern is None) != (self.stage == "dense"):
            raise MaskLLMError(f"checkpoint stage {self.stage} with pattern {self.pattern}; wanted a pattern for all but dense")

    @property
    def block_pattern(self) -> Pattern | None:
        """The N:M pattern; None if there are no masks or they follow no pattern. Raises MaskLLMError if it is malformed."""
        return None if self.pattern in (None, UNSTRUCTURED) else Pattern.parse(self.pattern)

    @property
    def has_prior(self) -> bool:
        """Whether the checkpoint holds a one-shot mask."""
        return self.method is not None

    @property
    def weights_dtype(self) -> str | dict[str, str] | None:
        """If the weights were trained, the dtype of each tensor before that, or one for all; None if they are the original's."""
        return self.details.get("weights_dtype")


def write_info(directory: Path, info: CheckpointInfo) -> None:
    """Write `maskllm.json` into `directory`."""
    write_json(directory / INFO, {"format_version": FORMAT_VERSION, **dataclasses.asdict(info)})


def read_info(directory: Path) -> CheckpointInfo:
    """Read `maskllm.json` in `directory`. Raises MaskLLMError naming the file if it is malformed or of a newer format."""
    path = directory / INFO
    values = read_json_object(path)
    version = values.pop("format_version", None)
    if not isinstance(version, int) or version < 1:
        raise MaskLLMError(f"{path}: format_version is {version!r}; wanted a positive integer")
    if version > FORMAT_VERSION:
        raise MaskLLMError(f"{path}: format_version {version} is newer than this program's {FORMAT_VERSION}; update maskllm")
    try:
        info = CheckpointInfo(**values)
        _ = info.block_pattern
        return info
    except (TypeError, MaskLLMError) as error:
        raise MaskLLMError(f"{path}: {error}") from None
