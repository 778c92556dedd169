"""The data of `maskllm finetune`, and what it says of data and models that cannot be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, WhisperForConditionalGeneration

from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.finetuning.run import TASKS
from maskllm.finetuning.settings import FinetuneSettings
from maskllm.finetuning.speech import SpeechTask, _normalizer, read_audio
from maskllm.finetuning.text import TextTask
from maskllm.finetuning.training import errors_of_workers
from tests.finetuning import command_models as tiny

MODELS: dict[str, Callable[[Path], Path]] = {"text": tiny.llama, "translation": tiny.t5, "speech": tiny.whisper}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {task: make(folder / task) for task, make in MODELS.items()}


@pytest.fixture
def refused(models, tmp_path, capsys) -> Callable[..., str]:
    """Run the command; returns the line that it prints."""

    def run(task: str, *data: Path, model: Path | None = None, options: tuple = ()) -> str:
        words = [
            "--task",
            task,
            "--model",
            model or models[task],
            "--data",
            *data,
            "--pattern",
            "2:4",
            "--output",
            tmp_path / "out",
        ]
        capsys.readouterr()  # what making a model printed
        assert main(["finetune", *map(str, words), "--max-length", "16", *map(str, options)]) == 1
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1, error
        assert not (tmp_path / "out").exists()
        return error[0]

    return run


def test_text_that_cannot_be_used(refused, tmp_path):
    data = tmp_path / "data.jsonl"
    assert f"{data}: no such file" in refused("text", data)
    data.write_text("")
    assert f"{data}: has no text" in refused("text", data)
    data.write_text("one two")
    assert f"{data}: the text has 4 tokens, less than one window of --max-length 16" in refused("text", data)
    tiny.json_lines(data, [{"text": "one"}, {"words": "two"}])
    assert f"{data}:2: no key 'text'" in refused("text", data)
    tiny.json_lines(data, [{"prompt": "one", "completion": ""}])
    assert f"{data}:1: the completion is empty" in refused("text", data)
    tiny.json_lines(data, [{"prompt": "one"}])
    assert f"{data}:1: no key 'completion'" in refused("text", data)
    tiny.json_lines(data, [{"prompt": "one " * 20, "completion": "two"}])
    assert f"{data}: all 1 prompts are longer than --max-length 16" in refused("text", data)
    tiny.json_lines(data, [{"prompt": "one", "completion": "two"}])
    assert f"{data}: has one example, and none is left to measure on; give --eval-data" in refused("text", data)
    plain = tmp_path / "plain.txt"
    plain.write_text("one two")
    assert "files of different kinds" in refused("text", data, plain)


def test_lines_that_do_not_pair(refused, tmp_path):
    source, target = tiny.pairs(tmp_path)
    assert "--data: found 1 files, wanted two, the source and the target lines" in refused("translation", source)
    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[:-1]))
    assert f"{source} has 10 lines and {target} has 9" in refused("translation", source, target)
    target.write_text("".join([*lines[:3], "\n", *lines[4:]]))
    assert f"{target}:4: is empty, but line 4 of {source} is not; wanted pairs of lines" in refused("translation", source, target)
    target.write_bytes(b"\xff\n" * 10)
    assert f"{target}:1: not UTF-8: byte 0xff" in refused("translation", source, target)
    source.write_text("\n\n")
    target.write_text("\n\n")
    assert f"{source}: has no text" in refused("translation", source, target)


def test_recordings_that_cannot_be_used(refused, tmp_path):
    manifest = tmp_path / "manifest.jsonl"

    def says(audio: str, text: str = "one") -> str:
        tiny.json_lines(manifest, [{"audio": audio, "text": text}])
        return refused("speech", manifest)

    sound = tmp_path / "a.wav"
    assert f"{manifest}:1: {sound}: no such file" in says("a.wav")
    sound.write_bytes(b"RIFF and then nothing")
    assert f"{manifest}:1: {sound}: not audio that soundfile can read" in says("a.wav")
    sound.write_bytes(b"")
    assert f"{manifest}:1: {sound}: not audio that soundfile can read" in says("a.wav")
    soundfile.write(sound, np.zeros(0), 8000)
    assert f"{manifest}:1: {sound}: has no samples" in says("a.wav")
    soundfile.write(sound, np.zeros(12000), 8000)
    assert f"{manifest}:1: {sound}: is 1.5 s long, but the model hears 1 s at once; cut it" in says("a.wav")
    soundfile.write(sound, np.zeros(4000), 8000)
    assert f"{manifest}:1: the text is empty" in says("a.wav", " ")
    assert f"{manifest}:1: the text has 31 tokens, more than 16" in says("a.wav", "one " * 30)
    manifest.write_text("")
    assert f"{manifest}: has no recordings" in refused("speech", manifest)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_recording_that_is_damaged_is_named_with_its_line(models, tmp_path, workers):
    sound = tmp_path / "a.flac"
    soundfile.write(sound, np.random.default_rng(1).uniform(-0.5, 0.5, 4000), 8000)
    sound.write_bytes(sound.read_bytes()[:3000])
    tiny.json_lines(tmp_path / "manifest.jsonl", [{"audio": "a.flac", "text": "one"}])
    recordings = SpeechTask(models["speech"], settings("speech")).read([str(tmp_path / "manifest.jsonl")], for_training=True)

    def said() -> str:
        try:
            with errors_of_workers():
                next(iter(DataLoader(recordings, num_workers=workers)))
        except MaskLLMError as error:
            return str(error)

    start = f"{tmp_path / 'manifest.jsonl'}:1: {sound}: is damaged; soundfile cannot read it to its end"
    found = said()
    assert found.startswith(start) and "\n" not in found


def test_a_task_that_the_model_cannot_do(refused, models, tmp_path):
    data = tiny.documents(tmp_path / "documents.jsonl")
    assert f"--task text: {models['speech']} is a whisper model; wanted a decoder-only language model" in refused(
        "text", data, model=models["speech"]
    )
    assert f"--task translation: {models['text']} is a llama model; wanted an encoder-decoder model of text" in refused(
        "translation", data, data, model=models["text"]
    )
    assert f"--task speech: {models['translation']} is a t5 model; wanted an encoder-decoder model of sound" in refused(
        "speech", data, model=models["translation"]
    )


@pytest.mark.parametrize("task", MODELS)
def test_a_tokenizer_of_another_model_is_refused(task, refused, tmp_path):
    model = MODELS[task](tmp_path / "model")
    smaller = TASKS[task].model_class.from_pretrained(model)
    smaller.resize_token_embeddings(8)
    smaller.save_pretrained(model)
    make = {
        "text": lambda folder: [tiny.documents(folder / "documents.jsonl")],
        "translation": tiny.pairs,
        "speech": lambda folder: [tiny.recordings(folder)],
    }
    said = refused(task, *make[task](tmp_path), model=model)
    assert f"{model}'s tokenizer: found token " in said and "wanted less than the model's vocabulary of 8" in said


def test_the_short_text_is_named(models, tmp_path):
    (tmp_path / "long.txt").write_text("one two " * 20)
    (tmp_path / "short.txt").write_text("one")
    task = TextTask(models["text"], settings("text", max_length=16))
    with pytest.raises(MaskLLMError, match=r"short\.txt: the text has \d tokens, less than one window"):
        task.read([str(tmp_path / "long.txt"), str(tmp_path / "short.txt")], for_training=False)


def test_a_model_without_blocks(refused, tmp_path):
    config = LlamaConfig(
        vocab_size=len(tiny.VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=0, num_attention_heads=1
    )
    model = tiny.saved(LlamaForCausalLM(config), tmp_path / "model", "$A")
    data = tiny.documents(tmp_path / "documents.jsonl")
    assert "LlamaForCausalLM has no stack of blocks" in refused("text", data, model=model)


def test_a_whisper_whose_features_do_not_fit(refused, tmp_path):
    model = tiny.whisper(tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(settings | {"chunk_length": 30}))
    assert "its feature extractor gives 3000 frames (chunk_length 30 s), but its encoder takes 100" in refused(
        "speech", tiny.recordings(tmp_path), model=model
    )


def settings(task: str, **values: object) -> FinetuneSettings:
    return FinetuneSettings(task=task, data=("x",), pattern="2:4", **values).complete()


def test_windows_go_over_documents_that_each_end(models, tmp_path):
    data = tiny.json_lines(tmp_path / "a.jsonl", [{"text": "one two"}, {"text": "three"}, {"text": "four five six"}])
    found = TextTask(models["text"], settings("text", max_length=4)).read([str(data)], for_training=True)
    start, end = tiny.VOCABULARY[tiny.START], tiny.VOCABULARY[tiny.END]
    one, two, three, four, five, six = (tiny.VOCABULARY[word] for word in ["one", "two", "three", "four", "five", "six"])
    assert [list(window["input_ids"]) for window in found] == [
        [start, one, two, end],
        [start, three, end, start],
        [four, five, six, end],
    ]


def test_a_batch_of_completions_is_padded_and_prompts_do_not_count(models, tmp_path):
    lines = [{"prompt": "one two", "completion": " three"}, {"prompt": "four", "completion": " five six seven eight"}]
    task = TextTask(models["text"], settings("text", max_length=5))
    batch = task.collate(task.read([str(tiny.json_lines(tmp_path / "a.jsonl", lines))], for_training=True))
    ids = tiny.VOCABULARY
    assert batch["labels"].tolist() == [
        [-100, -100, -100, ids["three"], ids[tiny.END]],
        [-100, -100, ids["five"], ids["six"], ids["seven"]],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [5, 5]


def test_speech_batches_leave_silence_out(models, tmp_path):
    task = SpeechTask(models["speech"], settings("speech"))
    examples = task.read([str(tiny.recordings(tmp_path))], for_training=True)
    batch = task.collate([examples[0], examples[1]])  # wav and flac, 0.4 s of the window of 1 s
    assert batch["input_features"].shape == (2, 16, 100)
    assert batch["attention_mask"].sum(1).tolist() == [40, 40]
    first = [tiny.VOCABULARY[word] for word in tiny.sentences(1)[0].split()]
    assert batch["labels"][0].tolist() == [*first, tiny.VOCABULARY[tiny.END]]  # the model puts the start in front


def test_labels_begin_as_the_model_writes(tmp_path):
    directory = tiny.multilingual_whisper(tmp_path / "model")
    task = SpeechTask(directory, settings("speech", language="english"))
    model = WhisperForConditionalGeneration.from_pretrained(directory)
    seen = []
    model.model.decoder.register_forward_pre_hook(lambda _m, _a, given: seen.append(given["input_ids"]), with_kwargs=True)
    model.generate(torch.zeros(1, 16, 100), **task.generation_options() | {"max_new_tokens": 1})
    start, *prefix = seen[0][0].tolist()
    assert task.tokenizer.convert_ids_to_tokens([start, *prefix]) == [
        "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>",
    ]  # fmt: skip
    labels = task.read([str(tiny.recordings(tmp_path))], for_training=True)[0]["labels"]
    text, end = task.tokenizer(tiny.sentences(1)[0], add_special_tokens=False)["input_ids"], task.tokenizer.eos_token_id
    assert labels == [*prefix, *text, end]


def test_a_whisper_and_its_language(refused, models, tmp_path):
    data, model = tiny.recordings(tmp_path), tiny.multilingual_whisper(tmp_path / "model")
    assert f"{model}: is a multilingual Whisper; give the language of the recordings, such as --language english" in refused(
        "speech", data, model=model
    )
    assert "--language chinese: the model does not have it; it has en" in refused(
        "speech", data, model=model, options=("--language", "chinese")
    )
    assert "--language klingon: the tokenizer cannot be set to it" in refused(
        "speech", data, model=model, options=("--language", "klingon")
    )
    assert f"--language english: {models['speech']} has no languages in its generation_config.json; leave it out" in refused(
        "speech", data, options=("--language", "english")
    )
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(generation | {"is_multilingual": False}))
    assert f"--language english: {model} writes English only; leave it out" in refused(
        "speech", data, model=model, options=("--language", "english")
    )


@pytest.mark.parametrize(("task", "name"), [("speech", "voxtral"), ("translation", "qwen2_audio"), ("speech", "granite_speech")])
def test_models_of_sound_without_an_encoder_decoder_are_refused(task, name, refused, tmp_path):
    """transformers counts them among its models of speech or of text to text, but their decoder has no labels of its own."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": name}))
    data = tiny.documents(tmp_path / "documents.jsonl")
    files = [data] * (2 if task == "translation" else 1)
    assert f"is a {name} model; wanted an encoder-decoder model of" in refused(task, *files, model=tmp_path / "model")


def test_rotary_positions_may_be_stretched(tmp_path):
    model = tiny.llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    with pytest.raises(MaskLLMError, match="--max-length 100: the model's context has 64 tokens"):
        TextTask(model, settings("text", max_length=100))
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    (model / "config.json").write_text(json.dumps(config))
    TextTask(model, settings("text", max_length=100))


def test_digits_are_scored_without_their_spaces():
    digits = _normalizer("digits", None)
    assert digits("92714.") == digits("9 2 7 1 4") == digits("Nine, two seven one FOUR!") == "9 2 7 1 4"
    assert digits("oh") == ""
    assert _normalizer("english", {"colour": "color"})("Mr. Smith's  colour!") == "mister smith is color"
    assert _normalizer("basic", None)("  Ja, KLAR. ") == "ja klar"


def test_sound_is_resampled_to_one_channel(tmp_path):
    times = np.arange(8000) / 8000
    stereo = np.stack([np.sin(2 * np.pi * 440 * times), 0 * times], axis=1)
    soundfile.write(tmp_path / "a.flac", stereo, 8000)
    found = read_audio(tmp_path / "a.flac", 16000, "data.jsonl:1")
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert found.dtype == np.float32 and found.shape == (16000,)
    assert np.abs(found - wanted)[200:-200].max() < 1e-3
