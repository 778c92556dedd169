"""Rotary frequencies and attention factors of every rope type and spelling, compared with transformers' own from the same file."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from maskllm.families.registry import read_model_config
from maskllm.families.rope import rotary_frequencies
from tests.families.tiny import BASE, LONGROPE, NEMOTRON, SCALED_ROPE, YARN

LLAMA = BASE | {"model_type": "llama", "hidden_act": "silu"}
ROTARY = {"llama": LlamaRotaryEmbedding, "nemotron": NemotronRotaryEmbedding}

LINEAR = {"rope_type": "linear", "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
LLAMA3 = {key: value for key, value in SCALED_ROPE.items() if key != "original_max_position_embeddings"}
PUBLISHED_LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
OLD_NEMOTRON = NEMOTRON | {"hidden_act": "relu2"}

CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta outside": {"rope_theta": 500.0},
    "theta inside": {"rope_parameters": {"rope_theta": 500.0}},
    "theta in both": {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 700.0},
    "default": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "empty": {"rope_parameters": {}, "rope_scaling": None, "rope_theta": 500.0},
    "empty rope_scaling": {"rope_parameters": LINEAR, "rope_scaling": {}},
    # Both sections: rope_scaling counts, and theta is not taken from rope_parameters.
    "both sections": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_scaling": LINEAR},
    "both sections, theta outside": {"rope_parameters": LLAMA3, "rope_scaling": YARN, "rope_theta": 700.0},
    "type": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0},
    "type in rope_parameters": {"rope_parameters": {"type": "linear", "factor": 2.0}},
    "type and rope_type": {"rope_scaling": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
    "rope_type and type": {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}},
    "linear": {"rope_parameters": LINEAR},
    "linear shrinks": {"rope_parameters": LINEAR | {"factor": 0.5}},
    "linear and an original length": {"rope_parameters": LINEAR, "original_max_position_embeddings": 16},
    "unknown keys": {"rope_scaling": LINEAR | {"finetuned": True}},
    "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
    "dynamic, integers": {"rope_scaling": {"type": "dynamic", "factor": 2}, "rope_theta": 10000, "max_position_embeddings": 64},
    "dynamic and an original length": {
        "rope_parameters": DYNAMIC | {"original_max_position_embeddings": 32},
        "original_max_position_embeddings": 16,
        "max_position_embeddings": 64,
    },
    "yarn": {"rope_parameters": YARN},
    "yarn, type": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, "rope_theta": 1e6},
    "yarn, original length outside": {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 64},
    "yarn, original length in both": {"rope_parameters": YARN, "original_max_position_embeddings": 96},
    "yarn, no original length": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn, attention_factor": {"rope_parameters": YARN | {"attention_factor": 0.7, "mscale": 2.0, "mscale_all_dim": 1.0}},
    "yarn, mscale": {"rope_parameters": YARN | {"mscale": 0.707}},
    "yarn, mscale and mscale_all_dim": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}},
    "yarn, mscale_all_dim is 0": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0}},
    "yarn, betas are 0 or null": {"rope_parameters": YARN | {"beta_fast": 0, "beta_slow": None}},
    "yarn, betas are equal": {"rope_parameters": YARN | {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False}},
    "yarn, betas are swapped": {"rope_parameters": YARN | {"beta_fast": 1.0, "beta_slow": 20.0}},
    "yarn, truncate": {"rope_parameters": YARN | {"truncate": True}},
    "yarn, not truncated": {"rope_parameters": YARN | {"truncate": False}},
    "yarn, truncate is null": {"rope_parameters": YARN | {"truncate": None}},
    "yarn, factor is null": {"rope_parameters": YARN | {"factor": None}},
    "yarn, factor is 1": {"rope_parameters": YARN | {"factor": 1.0}},
    "yarn, whole range": {"rope_parameters": YARN | {"beta_fast": 1e4, "beta_slow": 1e-4}},
    "longrope": {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 64}, "rope_theta": 500.0},
    "longrope, original length outside": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
    "longrope, original length in both": {
        "rope_scaling": LONGROPE | {"original_max_position_embeddings": 400},
        "original_max_position_embeddings": 64,
    },
    "longrope, no original length": {"rope_scaling": LONGROPE},
    "longrope, factor": {"rope_scaling": LONGROPE | {"factor": 32.0}, "original_max_position_embeddings": 64},
    "longrope, factor is 1": {"rope_scaling": LONGROPE | {"factor": 1.0}, "original_max_position_embeddings": 64},
    "longrope, attention_factor": {"rope_scaling": LONGROPE | {"attention_factor": 1.3}, "original_max_position_embeddings": 64},
    "llama3": {"rope_parameters": SCALED_ROPE},
    "llama3, old": {"rope_scaling": {"type": "llama3"} | {k: v for k, v in SCALED_ROPE.items() if k != "rope_type"}},
    "llama3, original length outside": {"rope_parameters": LLAMA3, "original_max_position_embeddings": 100},
    "llama3, original length in both": {"rope_parameters": SCALED_ROPE, "original_max_position_embeddings": 100},
    "llama3, no original length": {"rope_parameters": LLAMA3},
    "llama3, factors are swapped": {"rope_parameters": SCALED_ROPE | {"low_freq_factor": 5.0, "high_freq_factor": 1.5}},
    "llama3.1": {"rope_scaling": PUBLISHED_LLAMA3 | {"factor": 8.0}, "rope_theta": 500000.0, "head_dim": 128},
    "llama3.2": {"rope_scaling": PUBLISHED_LLAMA3 | {"factor": 32.0}, "rope_theta": 500000.0, "head_dim": 64},
    "partial, family's default": OLD_NEMOTRON,
    "partial outside": OLD_NEMOTRON | {"partial_rotary_factor": 0.75, "rope_theta": 500.0},
    "partial inside": OLD_NEMOTRON | {"rope_parameters": YARN | {"partial_rotary_factor": 0.75}},
    "partial in both": OLD_NEMOTRON | {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.75}, "partial_rotary_factor": 0.25},
    "partial dynamic": OLD_NEMOTRON | {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
    "partial llama3": OLD_NEMOTRON | {"rope_parameters": SCALED_ROPE, "original_max_position_embeddings": 100},
    "partial longrope": OLD_NEMOTRON
    | {"rope_scaling": LONGROPE | {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}, "original_max_position_embeddings": 64},
}


@pytest.fixture
def write(tmp_path):
    def write(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.mark.parametrize("seq_length", [40, 64, 300])
@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_attention_factors_are_those_of_transformers(name, seq_length, write):
    path = write(LLAMA | CASES[name])
    config = AutoConfig.from_pretrained(path)
    rotary = ROTARY[config.model_type](config)
    rotary(torch.empty(0), torch.arange(seq_length)[None])
    model = read_model_config(path / "config.json")
    found = rotary_frequencies(model.rope, seq_length)
    # transformers computes the theta of `dynamic` in fp32.
    torch.testing.assert_close(found, rotary.inv_freq, rtol=1e-6 if "dynamic" in name else 0, atol=0)
    assert model.rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-15)


def test_su_is_longrope(write):
    """transformers reads it so in Phi-3, which has this type of scaling."""
    su = {"rope_scaling": LONGROPE | {"type": "su", "original_max_position_embeddings": 64}, "original_max_position_embeddings": 64}
    expected = Phi3RotaryEmbedding(AutoConfig.from_pretrained(write(LLAMA | su | {"model_type": "phi3", "pad_token_id": 0})))
    rope = read_model_config(write(LLAMA | su) / "config.json").rope
    assert torch.equal(rotary_frequencies(rope, 64), expected.inv_freq)
    assert rope.attention_factor == expected.attention_scaling


@pytest.mark.parametrize(
    ("name", "context"),
    [("default", 512), ("linear", 3 * 512), ("dynamic", 3 * 64), ("yarn, type", 512), ("yarn, no original length", 4 * 512),
     ("longrope", 512), ("llama3", 512)],
)  # fmt: skip
def test_some_types_stretch_the_context(name, context, write):
    assert read_model_config(write(LLAMA | CASES[name]) / "config.json").context == context


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown keys", "config.json: rope_scaling: 'finetuned' ignored, as in transformers"),
        ("both sections", "config.json: rope_parameters differs from rope_scaling and is ignored, as in transformers"),
    ],
)
def test_what_is_ignored_is_said(name, words, write, caplog):
    with caplog.at_level(logging.WARNING, "maskllm"):
        read_model_config(write(LLAMA | CASES[name]) / "config.json")
    assert len(caplog.messages) == 1
    assert words in caplog.text


def test_nothing_is_said_of_known_keys(write, caplog):
    for name in ("yarn, original length in both", "longrope", "llama3, old", "partial in both"):
        read_model_config(write(LLAMA | CASES[name]) / "config.json")
    assert not caplog.messages
