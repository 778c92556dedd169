"""The models of one evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Candidate:
    """A model to evaluate."""

    label: str
    """Its name in tables, unlike the others'."""
    model: str
    """A directory or hub id; what a report calls the model."""
    mask: str | None = None
    """A mask file, or the hub id of one."""
    mask_base: str | None = None
    """The mask file that `mask` is a difference to, if it is one."""
    directory: Path | None = None
    """The Hugging Face directory to read, if `model` is something else."""


def named(models: Sequence[str], masks: Mapping[int, str], bases: Mapping[int, str]) -> list[Candidate]:
    """The models with labels: the path's last part, the mask file's name, and the place in the list if others have the same label.

    Args:
        masks, bases: place in `models` -> mask file, or what that is a difference to.
    """
    names = [
        Path(model).absolute().name + (f" + {Path(masks[place]).name}" if place in masks else "")
        for place, model in enumerate(models)
    ]
    count = Counter(names)
    labels = [f"{name} ({place + 1})" if count[name] > 1 else name for place, name in enumerate(names)]
    return [Candidate(labels[place], model, masks.get(place), bases.get(place)) for place, model in enumerate(models)]
