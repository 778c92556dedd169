"""The text models of the Gemma 3 family (arXiv 2503.19786).

They differ from Gemma 2 in a norm of the queries and keys of each head instead of soft-capping, and in rotary embeddings of their own
in the layers with a sliding window, which are five of six.
"""

from __future__ import annotations

from typing import Any

from maskllm.families.gemma2 import BASE_PREFIX, DERIVED_BUFFERS, TIED_COPIES, parameter_map, read_shared
from maskllm.families.hf_config import HFConfig
from maskllm.families.model_config import ModelConfig
from maskllm.families.rope import Rope, read_rope
from maskllm.families.windows import read_windows

__all__ = ["BASE_PREFIX", "DERIVED_BUFFERS", "TIED_COPIES", "parameter_map", "read_config"]


def read_config(hf: HFConfig) -> ModelConfig:
    """The architecture in a `config.json` with model_type "gemma3_text".

    Absent keys have the defaults of `transformers.Gemma3TextConfig`. Like transformers, it does not apply `attn_logit_softcapping`.
    Raises MaskLLMError that names the key if a value is missing, malformed or not supported.
    """
    shared = read_shared(hf, max_position_embeddings=131072)
    period = hf.integer("sliding_window_pattern", default=6)
    windows = read_windows(
        hf,
        shared["num_layers"],
        window=hf.nullable(hf.integer, "sliding_window", default=4096),
        default=lambda layer: (layer + 1) % period != 0,
    )
    rope, local_rope = (_read_rope(hf, kind, shared) for kind in ("full_attention", "sliding_attention"))
    if rope.attention_factor != local_rope.attention_factor:
        raise hf.error(
            "rope_parameters: full_attention and sliding_attention scale attention by different factors, "
            f"{rope.attention_factor} and {local_rope.attention_factor}; only the same factor is supported"
        )
    return ModelConfig(
        model_type="gemma3_text",
        qk_norm=True,
        rope=rope,
        local_rope=local_rope if windows else None,
        logit_softcap=hf.nullable(hf.number, "final_logit_softcapping", default=None),
        **windows,
        **shared,
    )


def _read_rope(hf: HFConfig, kind: str, shared: dict[str, Any]) -> Rope:
    """The rotary settings of the layers of a kind. Older configs have them outside of a section for each kind."""
    old_theta, theta = ("rope_theta", 1e6) if kind == "full_attention" else ("rope_local_base_freq", 1e4)
    values = {"rope_theta": hf.number(old_theta, default=theta)}
    if hf.has("rope_scaling") and kind == "full_attention":
        values["rope_scaling"] = hf.values["rope_scaling"]
    sections = hf.section("rope_parameters") if hf.has("rope_parameters") else HFConfig({}, hf.source)
    if sections.has(kind):
        values["rope_parameters"] = sections.values[kind]
    return read_rope(
        HFConfig(values, f"{hf.source}: {kind}"),
        head_dim=shared["head_dim"],
        max_position_embeddings=shared["max_position_embeddings"],
    )
