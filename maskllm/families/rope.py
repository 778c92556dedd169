"""Rotary position embeddings: their settings in a Hugging Face `config.json`, and the frequencies that these give.

Settings and frequencies are those of `transformers.modeling_rope_utils`, bit for bit, also if keys are absent or contradict.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from maskllm.families.hf_config import HFConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rope:
    """Which channels of each head are rotated with the position, and how fast."""

    theta: float
    dim: int
    """The first `dim` channels are rotated, the others are not (partial rotary embeddings)."""
    scaling: RopeScaling | None = None

    @property
    def attention_factor(self) -> float:
        """The rotated channels of queries and keys are multiplied by it."""
        return 1.0 if self.scaling is None else self.scaling.attention_factor

    def positions_per_radian(self) -> torch.Tensor:
        """How many positions turn each pair of channels by one radian without scaling, fp32 [dim / 2]."""
        return self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim)


class RopeScaling(ABC):
    """What a `rope_type` other than default makes of the frequencies, so that a model reads longer texts than it was trained on."""

    attention_factor = 1.0
    """The rotated channels of queries and keys are multiplied by it."""

    @abstractmethod
    def frequencies(self, rope: Rope, seq_length: int) -> torch.Tensor:
        """The angle per position of each pair of channels in a sequence of `seq_length` tokens, in radians, fp32 [rope.dim / 2]."""

    def context(self, max_position_embeddings: int) -> int:
        """The longest sequence, in tokens, of a model with that value in its `config.json`."""
        return max_position_embeddings


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """`rope_type: linear`: all frequencies are divided by `factor`. `max_position_embeddings` is the length before the scaling."""

    factor: float

    def frequencies(self, rope: Rope, seq_length: int) -> torch.Tensor:
        return 1.0 / rope.positions_per_radian() / self.factor

    def context(self, max_position_embeddings: int) -> int:
        return int(self.factor * max_position_embeddings)


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """`rope_type: dynamic` ("NTK"): a sequence beyond the original length raises theta, the more the longer it is."""

    factor: float
    original_length: int

    def frequencies(self, rope: Rope, seq_length: int) -> torch.Tensor:
        stretch = self.factor * max(seq_length, self.original_length) / self.original_length - (self.factor - 1)
        theta = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
        return 1.0 / Rope(theta, rope.dim).positions_per_radian()

    def context(self, max_position_embeddings: int) -> int:
        return int(self.factor * max_position_embeddings)


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """`rope_type: yarn` (arXiv 2309.00071, section 3.2).

    Pairs that turn more than `beta_fast` times within the original length keep their frequency. Pairs that turn less than
    `beta_slow` times have it divided by `factor`. Between the two it is interpolated.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Whether the interpolation starts and ends at whole pairs."""
    attention_factor: float

    def frequencies(self, rope: Rope, seq_length: int) -> torch.Tensor:
        first, last = (self._pair_that_turns(turns, rope) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rope.dim - 1)
        if first == last:
            last += 0.001
        divided = ((torch.arange(rope.dim // 2).float() - first) / (last - first)).clamp(0, 1)
        kept = 1 - divided
        positions = rope.positions_per_radian()
        return 1.0 / (self.factor * positions) * (1 - kept) + 1.0 / positions * kept

    def context(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, int(self.factor * self.original_length))

    def _pair_that_turns(self, turns: float, rope: Rope) -> float:
        """The index, not rounded, of the pair that turns so many times within the original length."""
        return rope.dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


@dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """`rope_type: longrope` (arXiv 2402.13753): each pair has a divisor of its own, and another one beyond the original length."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    attention_factor: float

    def frequencies(self, rope: Rope, seq_length: int) -> torch.Tensor:
        divisors = self.long_factor if seq_length > self.original_length else self.short_factor
        return 1.0 / (torch.tensor(divisors) * rope.positions_per_radian())


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """`rope_type: llama3` (LLaMA 3.1).

    A frequency with a wavelength above original length / `low_freq_factor` is divided by `factor`. One with a wavelength below
    original length / `high_freq_factor` is kept. Between the two it is interpolated.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def frequencies(self, rope: Rope, seq_length: int) -> torch.Tensor:
        kept = 1.0 / rope.positions_per_radian()
        wavelengths = 2 * math.pi / kept
        share = (self.original_length / wavelengths - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - share) * kept / self.factor + share * kept
        short = torch.where(wavelengths < self.original_length / self.high_freq_factor, kept, between)
        return torch.where(wavelengths > self.original_length / self.low_freq_factor, kept / self.factor, short)


def rotary_frequencies(rope: Rope, seq_length: int) -> torch.Tensor:
    """The angle per position of each pair of channels in a sequence of `seq_length` tokens, in radians, fp32 [rope.dim / 2]."""
    if rope.scaling is None:
        return 1.0 / rope.positions_per_radian()
    return rope.scaling.frequencies(rope, seq_length)


def read_rope(hf: HFConfig, *, head_dim: int, max_position_embeddings: int, partial_rotary_factor: float | None = None) -> Rope:
    """The rotary settings of a `config.json`, in transformers 5's spelling (`rope_parameters`) or the older one (`rope_scaling`).

    `partial_rotary_factor` is the family's default share of the `head_dim` channels of a head that are rotated; None if the family
    always rotates all. Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    rope = _settings(hf)
    share = rope.number("partial_rotary_factor", default=partial_rotary_factor or 1.0)
    if partial_rotary_factor is None and share != 1:
        raise rope.error(f"partial_rotary_factor {share} is not supported in this family, only 1.0")
    dim = int(head_dim * share)
    if share > 1 or dim < 2 or dim % 2:
        raise rope.error(
            f"partial_rotary_factor {share} rotates {dim} of the {head_dim} channels of a head; wanted an even number of them"
        )
    return Rope(rope.number("rope_theta", default=10000.0), dim, _read_scaling(rope, dim, max_position_embeddings))


def _settings(hf: HFConfig) -> HFConfig:
    """All rotary settings in one section and one spelling, as `RotaryEmbeddingConfigMixin` of transformers 5 puts them together.

    `rope_scaling` counts before `rope_parameters`, and a key in either before the same key outside of it. One key is the other
    way round: `original_max_position_embeddings` outside counts before the one inside.
    """
    sections = [hf.section(key) for key in ("rope_scaling", "rope_parameters") if hf.values.get(key)]
    section = sections[0] if sections else HFConfig({}, hf.source)
    if sections and section.values != sections[-1].values:
        logger.warning("%s: rope_parameters differs from rope_scaling and is ignored, as in transformers", hf.source)
    values = dict(section.values)
    kind = next((values[key] for key in ("rope_type", "type") if section.has(key)), "default")
    values["rope_type"] = "longrope" if kind == "su" else kind
    for key in ("rope_theta", "partial_rotary_factor"):
        if hf.has(key) and not section.has(key):
            values[key] = hf.values[key]
    if hf.has("original_max_position_embeddings"):
        values["original_max_position_embeddings"] = hf.values["original_max_position_embeddings"]
    return HFConfig(values, section.source)


_KEYS = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings", "attention_factor"),
    *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("short_factor", "long_factor", "low_freq_factor", "high_freq_factor"),
}


def _read_scaling(rope: HFConfig, dim: int, max_position_embeddings: int) -> RopeScaling | None:
    unknown = sorted(rope.values.keys() - _KEYS)
    for key in unknown:
        if isinstance(rope.values[key], dict):
            raise rope.error(f"{key!r} is not supported: rotary settings of some layers, wanted the same settings for all layers")
    if unknown:
        logger.warning("%s: %s ignored, as in transformers", rope.source, ", ".join(map(repr, unknown)))
    original_length = rope.integer("original_max_position_embeddings", default=max_position_embeddings)
    match rope.values["rope_type"]:
        case "default":
            return None
        case "linear":
            return LinearScaling(rope.number("factor"))
        case "dynamic":
            return DynamicScaling(rope.number("factor"), max_position_embeddings)
        case "yarn":
            return _read_yarn(rope, original_length, max_position_embeddings)
        case "longrope":
            return _read_longrope(rope, dim, original_length, max_position_embeddings)
        case "llama3":
            low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
            return Llama3Scaling(rope.number("factor"), low, high, original_length)
        case kind:
            wanted = "'default', 'linear', 'dynamic', 'yarn', 'longrope' and 'llama3'"
            raise rope.error(f"rope_type {kind!r} is not supported, only {wanted}")


def _read_yarn(rope: HFConfig, original_length: int, max_position_embeddings: int) -> YarnScaling:
    def number(key: str) -> float | None:
        """None if the key is absent or 0."""
        return rope.number(key) if rope.values.get(key) else None

    factor = rope.number("factor", default=max_position_embeddings / original_length)
    mscale, mscale_all_dim = number("mscale"), number("mscale_all_dim")
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    elif mscale and mscale_all_dim:
        attention_factor = _yarn_attention_factor(factor, mscale) / _yarn_attention_factor(factor, mscale_all_dim)
    else:
        attention_factor = _yarn_attention_factor(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_length=original_length,
        beta_fast=number("beta_fast") or 32.0,
        beta_slow=number("beta_slow") or 1.0,
        truncate=rope.boolean("truncate", default="truncate" not in rope.values),
        attention_factor=attention_factor,
    )


def _yarn_attention_factor(factor: float, mscale: float) -> float:
    """Equation 22 of arXiv 2309.00071, with a weight `mscale` of the logarithm (DeepSeek)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_longrope(rope: HFConfig, dim: int, original_length: int, max_position_embeddings: int) -> LongRopeScaling:
    def divisors(key: str) -> tuple[float, ...]:
        values = rope.values.get(key)
        if not isinstance(values, list) or len(values) != dim // 2:
            found = f"a list of {len(values)}" if isinstance(values, list) else repr(values)
            raise rope.error(f"{key} is {found}; wanted a list of {dim // 2} numbers, one for each pair of rotated channels")
        return tuple(HFConfig({key: value}, rope.source).number(key) for value in values)

    factor = rope.number("factor", default=max_position_embeddings / original_length)
    if rope.has("attention_factor"):
        attention_factor = rope.number("attention_factor")
    else:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
    return LongRopeScaling(divisors("short_factor"), divisors("long_factor"), original_length, attention_factor)
