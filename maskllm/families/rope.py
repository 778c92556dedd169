"""Rotary position embeddings: their settings in a Hugging Face `config.json`, and the frequencies that these give."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from maskllm.families.hf_config import HFConfig


@dataclass(frozen=True)
class Llama3RopeScaling:
    """The `llama3` scaling of rotary frequencies (LLaMA 3.1), which lengthens the context; see `rotary_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """Which channels of each head are rotated with the position, and how fast."""

    theta: float
    dim: int
    """The first `dim` channels are rotated, the others are not (partial rotary embeddings)."""
    scaling: Llama3RopeScaling | None = None


def rotary_frequencies(rope: Rope) -> torch.Tensor:
    """The angle per position of each pair of channels, in radians, fp32 [rope.dim / 2].

    Scaling follows LLaMA 3.1 (`rope_type: llama3`). A frequency with a wavelength above original context / low_freq_factor is
    divided by `factor`. One with a wavelength below original context / high_freq_factor is kept. Between the two the scaling is
    interpolated.
    """
    channels = torch.arange(0, rope.dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / rope.theta ** (channels / rope.dim)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)


_KEYS = {"rope_type", "rope_theta", "partial_rotary_factor", *(entry.name for entry in fields(Llama3RopeScaling))}


def read_rope(hf: HFConfig, *, head_dim: int, max_position_embeddings: int, partial_rotary_factor: float = 1.0) -> Rope:
    """The rotary settings of a `config.json`, in transformers 5's spelling (`rope_parameters`) or the older one (`rope_scaling`).

    `partial_rotary_factor` is the family's default share of the `head_dim` channels of a head that are rotated. Raises MaskLLMError
    that names the key if a value is missing, malformed or not supported.
    """
    given = [_with_one_spelling(hf.section(key), hf) for key in ("rope_parameters", "rope_scaling") if hf.has(key)]
    rope = given[0] if given else _with_one_spelling(HFConfig({}, hf.source), hf)
    if given and rope.values != given[-1].values:
        raise hf.error(f"rope_parameters {rope.values} and rope_scaling {given[-1].values} differ; wanted one of them")
    share = rope.number("partial_rotary_factor", default=partial_rotary_factor)
    dim = int(head_dim * share)
    if share > 1 or dim < 2 or dim % 2:
        raise rope.error(
            f"partial_rotary_factor {share} rotates {dim} of the {head_dim} channels of a head; wanted an even number of them"
        )
    return Rope(rope.number("rope_theta", default=10000.0), dim, _read_scaling(rope, max_position_embeddings))


def _with_one_spelling(section: HFConfig, hf: HFConfig) -> HFConfig:
    """The rotary settings `section` of `hf` in one spelling, with the settings that older configs have outside of the section."""
    values = {("rope_type" if key == "type" else key): value for key, value in section.values.items()}
    for key in ("rope_theta", "partial_rotary_factor"):
        if hf.has(key):
            values.setdefault(key, hf.values[key])
    return HFConfig(values, section.source)


def _read_scaling(rope: HFConfig, max_position_embeddings: int) -> Llama3RopeScaling | None:
    kind = rope.values.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise rope.error(f"rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    for key in sorted(rope.values.keys() - _KEYS):
        raise rope.error(f"{key!r} is not supported, only {', '.join(sorted(_KEYS))}")
    if kind == "default":
        return None
    scaling = Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", default=max_position_embeddings),
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise rope.error(f"low_freq_factor {scaling.low_freq_factor} must be below high_freq_factor {scaling.high_freq_factor}")
    return scaling
