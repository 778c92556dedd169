"""Reading Hugging Face configs: both spellings of rotary settings, defaults, and an error with the name of each unsupported key."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from maskllm.errors import MaskLLMError
from maskllm.families.registry import read_model_config
from maskllm.huggingface.blocks import block_stacks, linears_of
from maskllm.megatron.transformer_config import transformer_config
from tests.families.tiny import BASE, CONFIGS, GPT2, LONGROPE, NEMOTRON, tiny_config

PLAIN = BASE | {"model_type": "llama", "hidden_act": "silu"}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 4}


@pytest.fixture
def read(tmp_path):
    def read(values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(values))
        return read_model_config(path)

    return read


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_transformers_wrote_is_read(name, tmp_path):
    hf = tiny_config(name)
    hf.save_pretrained(tmp_path)
    config = read_model_config(tmp_path / "config.json")
    assert config.model_type == hf.model_type
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (hf.num_hidden_layers, 32, 48)
    assert config.max_position_embeddings == hf.max_position_embeddings
    assert config.num_query_groups == getattr(hf, "num_key_value_heads", 4)
    assert config.head_dim == getattr(hf, "head_dim", 8)
    assert config.tie_word_embeddings == hf.tie_word_embeddings
    with torch.device("meta"):
        (blocks,) = block_stacks(AutoModelForCausalLM.from_config(hf)).values()
    biased = {name.split(".")[-1]: linear.bias is not None for name, linear in linears_of(blocks[0], "").items()}
    assert config.qkv_bias == next(biased[name] for name in ("q_proj", "qkv_proj", "c_attn") if name in biased)
    assert config.proj_bias == next(biased[name] for name in ("o_proj", "c_proj") if name in biased)
    assert config.mlp_bias == next(biased[name] for name in ("up_proj", "gate_up_proj", "c_fc") if name in biased)
    if hf.model_type == "gemma3_text":
        assert (config.rope.theta, config.local_rope.theta) == (1e4, 100.0)
    elif config.rope is not None:
        assert config.rope.theta == hf.rope_parameters["rope_theta"]
        assert config.rope.dim == config.head_dim * hf.rope_parameters.get("partial_rotary_factor", 1.0)


def test_an_old_nemotron_config_has_rotary_settings_outside_of_a_section(read):
    old = read(NEMOTRON | {"hidden_act": "relu2", "rope_theta": 500.0, "partial_rotary_factor": 0.75})
    assert (old.rope.theta, old.rope.dim, old.rope.scaling) == (500.0, 6, None)
    assert read(NEMOTRON).rope.dim == 4


def test_absent_keys_have_the_defaults_of_transformers(read):
    required = {key: BASE[key] for key in BASE if key not in ("max_position_embeddings", "rms_norm_eps")}
    config, defaults = read(required | {"model_type": "llama", "rope_scaling": None}), LlamaConfig(**required)
    assert config.norm_epsilon == defaults.rms_norm_eps
    assert config.max_position_embeddings == defaults.max_position_embeddings
    assert config.rope.theta == defaults.rope_parameters["rope_theta"]
    assert config.num_query_groups == defaults.num_key_value_heads
    assert config.tie_word_embeddings == defaults.tie_word_embeddings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "mrope", "factor": 4.0}}, "rope_parameters: rope_type 'mrope'"),
        ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "rope_scaling: rope_type ['linear']"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_scaling": LONGROPE | {"short_factor": [1.0] * 3}}, "short_factor is a list of 3; wanted a list of 4 numbers"),
        ({"rope_scaling": LONGROPE | {"long_factor": None}}, "long_factor is None; wanted a list of 4 numbers"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0, 2.0, "3", 4.0]}}, "long_factor is '3'; wanted a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters: 'full_attention' is not supported"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        (QWEN2 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported in this family, only 1.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "only 'default' and 'longrope'"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type 'mixtral' (mixture of experts) is not supported"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "model_type 'qwen3_moe' (mixture of experts) is not supported"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "model_type 'deepseek_v3' (mixture of experts) is not supported"),
        ({"model_type": "ernie4_5_moe", "moe_num_experts": 64}, "model_type 'ernie4_5_moe' (mixture of experts) is not supported"),
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"),
        ({"model_type": "gemma3"}, "the text models have model_type 'gemma3_text'"),
        (
            {"model_type": "qwen2", "num_key_value_heads": 4, "use_sliding_window": True, "layer_types": ["full_attention"]},
            "for each of the 2 layers",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1}, "final_logit_softcapping is -1"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 33}, "hidden_size 33 is not a multiple of num_attention_heads"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'"),
        (NEMOTRON | {"hidden_act": "silu"}, "hidden_act 'silu' is not supported, only 'relu2'"),
        (NEMOTRON | {"hidden_act": "relu2", "partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4 rotates 3"),
        (NEMOTRON | {"hidden_act": "relu2", "partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 rotates 12"),
        (GPT2 | {"activation_function": "relu"}, "activation_function 'relu' is not supported, only 'gelu_new'"),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights False"),
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        (GPT2 | {"add_cross_attention": True}, "add_cross_attention True"),
        (GPT2 | {"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        (GPT2 | {"n_embd": None}, "n_embd is missing"),
    ],
)
def test_an_unsupported_value_is_refused_with_its_key(read, values, words):
    with pytest.raises(MaskLLMError) as error:
        read(PLAIN | values)
    assert words in str(error.value)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"), [(b'{"a":\n 1,,}', "line 2"), (b"[1]", "wanted a JSON object"), (b"\xff\xfe{}", "not UTF-8")]
)
def test_a_file_that_is_not_a_json_object_is_refused(tmp_path, text, words):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(MaskLLMError, match=words):
        read_model_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("values", "size", "words"),
    [
        ({}, 3, "number of attention heads, 4"),
        ({"num_key_value_heads": 2}, 4, "key-value heads, 2"),
        ({"intermediate_size": 50}, 4, "MLP width, 50"),
    ],
)
def test_a_tensor_parallel_size_that_does_not_divide_is_refused(read, values, size, words):
    with pytest.raises(MaskLLMError, match=f"size {size} does not divide the model's .*{words}"):
        transformer_config(read(PLAIN | values), params_dtype=torch.float32, tensor_model_parallel_size=size)
