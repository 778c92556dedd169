"""Directories as people have them: the tokens are those of the library that defines the file, whatever transformers makes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from maskllm.data.tokenizer import load_tokenizer
from maskllm.errors import MaskLLMError

from .conftest import train_sentencepiece

TEXTS = ["hello world", " hello world", "  the  mask\n of", "", " ", "naïve 夜\t", "sparse weights ", "\n\nhello"]
LIBRARIES = pytest.mark.parametrize("use_gigatoken", [False, True])


def write_json(path: Path, contents: object) -> None:
    path.write_text(json.dumps(contents), encoding="utf-8")


def byte_level() -> Tokenizer:
    """Byte-level BPE, as Llama 3 and DeepSeek have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world the sparse mask of weights"] * 9, trainer)
    return tokenizer


@LIBRARIES
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_a_byte_level_tokenizer_keeps_its_spaces_under_any_class(tmp_path, tokenizer_class, use_gigatoken):
    own = byte_level()
    own.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"})
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(path, use_gigatoken=use_gigatoken)
        for text in [*TEXTS, "a</s> hello", "<s> hello"]:
            assert tokenizer.encode(text).tolist() == own.encode(text).ids
            assert own.decode(tokenizer.encode(text).tolist(), skip_special_tokens=False) == text
        assert (tokenizer.vocab_size, tokenizer.eod) == (280, 1)


@pytest.mark.parametrize(
    ("switches", "template", "before", "after"),
    [
        ({}, False, [], []),
        ({}, True, [0], []),
        ({"add_bos_token": True}, False, [0], []),
        ({"add_bos_token": True, "add_eos_token": True}, True, [0], [1]),
        ({"add_bos_token": False}, True, [], []),
        ({"add_bos_token": None}, True, [0], []),
        ({"add_eos_token": True}, True, [0], [1]),
    ],
)
def test_add_bos_token_and_add_eos_token_decide_over_the_post_processor(tmp_path, switches, template, before, after):
    own = byte_level()
    if template:
        own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>"} | switches)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        for use_gigatoken in (False, True):
            found = load_tokenizer(path, use_gigatoken=use_gigatoken).encode(" hello world").tolist()
            assert found == [*before, *own.encode(" hello world", add_special_tokens=False).ids, *after]


def test_tokens_that_only_the_config_lists_are_added(tmp_path):
    own = byte_level()
    own.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"280": {"content": "<|im|>", "special": True}}})
    tokenizer = load_tokenizer(tmp_path, use_gigatoken=False)
    assert tokenizer.encode("a<|im|> b").tolist() == [*own.encode("a").ids, 280, *own.encode(" b").ids]
    assert tokenizer.vocab_size == 281
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"290": {"content": "<|im|>"}}})
    with pytest.raises(MaskLLMError, match=r"tokenizer.json: gives token '<\|im\|>' the id 280, and .* lists it with id 290"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "eod"),
    [
        ({"tokenizer_config": {"eos_token": "</s>"}, "config": {"eos_token_id": 5}}, 1),
        ({"special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": False}}}, 1),
        ({"tokenizer_config": {"model_max_length": 1024}, "config": {"eos_token_id": 1}}, 1),  # as gpt2 has it
        ({"config": {"eos_token_id": [1, 0]}}, 1),
        ({"config": {"eos_token_id": 300}}, None),
        ({"tokenizer_config": {"eos_token": "<none>"}, "config": {"eos_token_id": 1}}, None),
        ({}, None),
    ],
)
def test_the_end_of_sequence_token(tmp_path, config, eod):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    for name, contents in config.items():
        write_json(tmp_path / f"{name}.json", contents)
    assert load_tokenizer(tmp_path).eod == load_tokenizer(tmp_path / "tokenizer.json").eod == eod


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("tokenizer_config.json", "{", r"tokenizer_config.json: line 1: not JSON: "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: wanted a JSON object, found list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "its special tokens cannot be read"),
        ("tokenizer_config.json", '{"bos_token": 5}', "its special tokens cannot be read .*found 5, wanted a token"),
        ("added_tokens.json", '{"a": "x"}', "its special tokens cannot be read"),
    ],
)
def test_a_damaged_file_beside_the_tokenizer_is_named(tmp_path, name, contents, message):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(contents)
    with pytest.raises(MaskLLMError, match=message):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def llama2() -> bytes:
    """A SentencePiece model with the settings of Llama 2."""
    generator = random.Random(0)
    words = ["the", "a", "model", "weight", "of", "mask", "hello", "world", "sparse", "and", "trained", "in", "to", "text"]
    return train_sentencepiece([" ".join(generator.choices(words, k=12)) for _ in range(200)], vocab_size=330)


LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONFIGS = [{"tokenizer_class": "LlamaTokenizer"}, LLAMA, LLAMA | {"legacy": False}, LLAMA | {"add_bos_token": True, "legacy": True}]


@LIBRARIES
@pytest.mark.parametrize("config", CONFIGS)
def test_a_llama_2_directory_gives_sentencepieces_own_tokens(tmp_path, llama2, config, use_gigatoken):
    own = sentencepiece.SentencePieceProcessor(model_proto=llama2)
    (tmp_path / "tokenizer.model").write_bytes(llama2)
    (tmp_path / "alone.model").write_bytes(llama2)
    write_json(tmp_path / "tokenizer_config.json", config)
    for path in (tmp_path, tmp_path / "tokenizer.model", tmp_path / "alone.model"):
        tokenizer = load_tokenizer(path, use_gigatoken=use_gigatoken)
        for text in TEXTS:
            assert tokenizer.encode(text).tolist() == [1, *own.encode(text)]
            assert tokenizer.round_trip(text).spelled == text
        assert (tokenizer.vocab_size, tokenizer.eod) == (330, 2)
    assert own.encode(" hello world", out_type=str) == ["▁", "▁hello", "▁world"]


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_the_models_own_settings_count(tmp_path, llama2, dummy_prefix):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(llama2)
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    write_json(tmp_path / "tokenizer_config.json", LLAMA)
    tokenizer = load_tokenizer(tmp_path)
    pieces = [tokenizer.reference.processor.id_to_piece(token) for token in tokenizer.encode("hello").tolist()]
    assert pieces == (["<s>", "▁hello"] if dummy_prefix else ["<s>", "he", "llo"])


# The tokens of transformers 4.57.6's LlamaTokenizerFast for these settings.
AFTER_SPECIAL_TOKENS = [
    (None, "a</s> hello", ["<s>", "▁a", "</s>", "▁", "▁hello"]),
    (None, "a</s>hello", ["<s>", "▁a", "</s>", "▁hello"]),
    (None, "</s>hello", ["<s>", "</s>", "▁hello"]),
    (None, "<|im|> hello", ["<s>", "<|im|>", "▁", "▁hello"]),
    (True, "a<|im|>hello", ["<s>", "▁a", "<|im|>", "▁hello"]),
    (False, "a</s> hello", ["<s>", "▁a", "</s>", "▁hello"]),
    (False, "a</s>hello", ["<s>", "▁a", "</s>", "he", "llo"]),
    (False, "</s>hello", ["<s>", "</s>", "he", "llo"]),
    (False, "<|im|> hello", ["<s>", "<|im|>", "▁hello"]),
    (False, "a<|im|>hello<|im|>", ["<s>", "▁a", "<|im|>", "he", "llo", "<|im|>"]),
]


@pytest.mark.parametrize(("older_file", "use_gigatoken"), [(False, False), (True, True)])
@pytest.mark.parametrize(("legacy", "text", "pieces"), AFTER_SPECIAL_TOKENS)
def test_text_after_a_special_token_keeps_its_space(tmp_path, llama2, legacy, text, pieces, older_file, use_gigatoken):
    (tmp_path / "tokenizer.model").write_bytes(llama2)
    config = dict(LLAMA) if legacy is None else LLAMA | {"legacy": legacy}
    if older_file:
        write_json(tmp_path / "added_tokens.json", {"<|im|>": 330})
    else:
        own = {str(i): {"content": token, "special": True} for i, token in enumerate(("<unk>", "<s>", "</s>"))}
        config["added_tokens_decoder"] = own | {"330": {"content": "<|im|>", "special": True, "normalized": False}}
    write_json(tmp_path / "tokenizer_config.json", config)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        tokenizer = load_tokenizer(path, use_gigatoken=use_gigatoken)
        processor = sentencepiece.SentencePieceProcessor(model_proto=llama2)
        found = ["<|im|>" if token == 330 else processor.id_to_piece(token) for token in tokenizer.encode(text).tolist()]
        assert found == pieces
        assert tokenizer.round_trip(text).spelled == text
        assert tokenizer.vocab_size == 331


def test_the_strings_of_special_tokens_are_text_for_a_model_alone(tmp_path, llama2):
    (tmp_path / "tokenizer.model").write_bytes(llama2)
    own = sentencepiece.SentencePieceProcessor(model_proto=llama2)
    assert load_tokenizer(tmp_path).encode("a</s> hello").tolist() == [1, *own.encode("a</s> hello")]


def test_added_tokens_that_strip_white_space_or_match_whole_words(tmp_path, llama2):
    (tmp_path / "tokenizer.model").write_bytes(llama2)
    own = sentencepiece.SentencePieceProcessor(model_proto=llama2)
    added = [AddedToken("<l>", lstrip=True), AddedToken("<r>", rstrip=True), AddedToken("mask", single_word=True)]
    keys = ("content", "lstrip", "rstrip", "single_word")
    decoder = {str(330 + i): {key: getattr(token, key) for key in keys} for i, token in enumerate(added)}
    write_json(tmp_path / "tokenizer_config.json", LLAMA | {"added_tokens_decoder": decoder})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a <l> a <r> a").tolist() == [1, *own.encode("a"), 330, *own.encode(" a "), 331, *own.encode("a")]
    assert tokenizer.encode("masks mask").tolist() == [1, *own.encode("masks "), 332]


def test_sentencepiece_without_bos_or_with_eos(tmp_path, llama2):
    (tmp_path / "tokenizer.model").write_bytes(llama2)
    own = sentencepiece.SentencePieceProcessor(model_proto=llama2).encode("hello")
    for switches, expected in (({"add_bos_token": False}, own), ({"add_eos_token": True}, [1, *own, 2])):
        write_json(tmp_path / "tokenizer_config.json", LLAMA | switches)
        for use_gigatoken in (False, True):
            assert load_tokenizer(tmp_path, use_gigatoken=use_gigatoken).encode("hello").tolist() == expected


INVALID_CONFIG = {"model_type": "llama", "hidden_size": 1792, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}


@pytest.mark.parametrize("config", [INVALID_CONFIG, {"model_type": "gpt2", "n_layer": "many"}, {"model_type": "no such family"}])
@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model", "vocab.json"])
def test_the_models_config_need_not_be_valid_for_transformers(tmp_path, llama2, config, kind):
    own = byte_level()
    if kind == "tokenizer.json":
        own.save(str(tmp_path / kind))
    elif kind == "tokenizer.model":
        (tmp_path / kind).write_bytes(llama2)
    else:
        own.model.save(str(tmp_path))  # vocab.json and merges.txt
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"})
    found = load_tokenizer(tmp_path)
    if kind != "tokenizer.model":
        assert [found.encode(text).tolist() for text in TEXTS] == [own.encode(text).ids for text in TEXTS]
    assert found.eod == (2 if kind == "tokenizer.model" else 1)


def test_the_reason_of_transformers_is_given_in_full(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(MaskLLMError, match=r"not a readable Hugging Face tokenizer: .{60}") as error:
        load_tokenizer(tmp_path)
    assert " ".join(str(error.value.__cause__).split()) in str(error.value) and "\n" not in str(error.value)


def test_a_tiktoken_file_is_not_taken_for_sentencepiece(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(MaskLLMError, match="tiktoken"):
        load_tokenizer(tmp_path)
