"""Whether tokens still spell the text from which they were made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from maskllm.errors import MaskLLMError


@dataclass(frozen=True)
class RoundTrip:
    """A text, and what its tokens spell."""

    text: str
    spelled: str
    same: bool
    """Whether both are the same after the tokenizer's own normalization."""
    unknown: bool
    """Whether one of the tokens stands for what is not in the vocabulary."""


@dataclass
class Fidelity:
    """How well a tokenizer keeps a sample of texts."""

    texts: int = 0
    gaps: int = 0
    """Places between two words of the texts."""
    kept_gaps: int = 0
    """Places between two words of what the tokens spell; in each text at most as many as the text has."""
    lost: str = ""
    """The first text with fewer such places, around its first difference."""
    changed: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Kind of change -> number of texts, and the first of them, cut to its first difference."""

    def add(self, trips: Iterable[RoundTrip]) -> None:
        """Count further texts."""
        for trip in trips:
            self.texts += 1
            gaps, found = (max(len(text.split()) - 1, 0) for text in (trip.text, trip.spelled))
            self.gaps += gaps
            self.kept_gaps += min(gaps, found)
            if found < gaps:
                self.lost = self.lost or _difference(trip.text, trip.spelled)
            if trip.unknown or not trip.same:
                kind = _kind(trip)
                count, example = self.changed.get(kind, (0, _difference(trip.text, trip.spelled)))
                self.changed[kind] = (count + 1, example)

    def check(self, tokenizer: str) -> None:
        """Raises MaskLLMError if more than half of the white space between words is lost. `tokenizer` names the tokenizer."""
        if self.gaps > 2 * self.kept_gaps:
            raise MaskLLMError(
                f"{tokenizer}: its tokens do not keep the spaces between words ({self.lost}); wanted a tokenizer that spells its text "
                "again: see the pre_tokenizer and the decoder in its tokenizer.json"
            )

    def warnings(self, tokenizer: str) -> list[str]:
        """A line for each kind of change."""
        return [
            f"{tokenizer}: in {count} of {self.texts} sampled passages {kind} ({example})"
            for kind, (count, example) in self.changed.items()
        ]


def _kind(trip: RoundTrip) -> str:
    text, spelled = ("".join(string.split()) for string in (trip.text, trip.spelled))
    rest = iter(text)
    if trip.unknown or (text != spelled and all(character in rest for character in spelled)):
        return "characters are not in the vocabulary"
    return "the tokens spell other white space" if text == spelled else "the tokens spell other text"


def _difference(text: str, spelled: str, width: int = 20) -> str:
    """Both texts around the first place at which they differ."""
    pairs = enumerate(zip(text, spelled, strict=False))
    first = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(text), len(spelled)))
    start = max(first - width, 0)
    return f"{text[start : first + width]!r} becomes {spelled[start : first + width]!r}"
