"""Tiny random models with word-level tokenizers, and data for them, as Hugging Face directories and files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

WORDS = """zero one two three four five six seven eight nine
null eins zwei drei vier fuenf sechs sieben acht neun""".split()  # noqa: SIM905
PAD, START, END, UNKNOWN = "<pad>", "<start>", "</s>", "<unk>"
VOCABULARY = {word: number for number, word in enumerate([PAD, START, END, UNKNOWN, *WORDS])}
RATE = 16000


def write_tokenizer(directory: Path, template: str) -> None:
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(name, VOCABULARY[name]) for name in (START, END)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END, unk_token=UNKNOWN
    ).save_pretrained(directory)


def saved(model: PreTrainedModel, directory: Path, template: str) -> Path:
    model.save_pretrained(directory)
    write_tokenizer(directory, template)
    return directory


def llama(directory: Path, *, hidden: int = 32, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return saved(LlamaForCausalLM(config).to(dtype), directory, f"{START} $A")


def t5(directory: Path) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(VOCABULARY), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return saved(T5ForConditionalGeneration(config), directory, f"$A {END}")


def whisper(directory: Path) -> Path:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(VOCABULARY), num_mel_bins=16, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50, max_target_positions=24,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=RATE).save_pretrained(directory)
    return saved(WhisperForConditionalGeneration(config), directory, f"{START} $A {END}")


def multilingual_whisper(directory: Path) -> Path:
    """One that writes English, with Whisper's own tokenizer, whose tokens are bytes."""
    names = ["endoftext", "startoftranscript", "en", "translate", "transcribe", "startofprev", "notimestamps"]
    letters = sorted(ByteLevel.alphabet())
    words = {name: len(letters) + index for index, name in enumerate(names)}
    end, start = words["endoftext"], words["startoftranscript"]
    torch.manual_seed(0)
    special = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    config = WhisperConfig(
        vocab_size=len(letters) + len(words), num_mel_bins=16, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=50, max_target_positions=40, **special,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        **special, is_multilingual=True, lang_to_id={"<|en|>": words["en"]}, max_length=40, no_timestamps_token_id=words["notimestamps"],
        task_to_id={name: words[name] for name in ("transcribe", "translate")},
    )  # fmt: skip
    model.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=RATE).save_pretrained(directory)
    tokenizer = WhisperTokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer.add_tokens([AddedToken(f"<|{name}|>", special=True, normalized=False) for name in names])
    tokenizer.save_pretrained(directory)
    return directory


def sentences(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, 7, count)
    return [" ".join(WORDS[start : start + 4]) for start in starts]


def json_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def documents(path: Path, count: int = 44) -> Path:
    return json_lines(path, [{"text": text} for text in sentences(count)])


def pairs(folder: Path, count: int = 10) -> list[Path]:
    source, target = folder / "source.txt", folder / "target.txt"
    texts = sentences(count)
    source.write_text("".join(f"{text}\n" for text in texts))
    target.write_text("".join(f"{' '.join(WORDS[WORDS.index(word) + 10] for word in text.split())}\n" for text in texts))
    return [source, target]


def recordings(folder: Path, count: int = 6, rate: int = 8000) -> Path:
    """A manifest beside a folder of recordings: a tone for each word."""
    (folder / "clips").mkdir()
    lines = []
    for number, text in enumerate(sentences(count)):
        tones = [np.sin(np.arange(rate // 10) * (2 * np.pi * (200 + 80 * WORDS.index(word)) / rate)) for word in text.split()]
        name = f"clips/{number}.{'flac' if number % 2 else 'wav'}"
        soundfile.write(folder / name, 0.5 * np.concatenate(tones), rate)
        lines.append({"audio": name, "text": text})
    return json_lines(folder / "manifest.jsonl", lines)
