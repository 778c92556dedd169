"""Speech recognition: an encoder-decoder model of sound, measured by the word error rate."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, GenerationConfig
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from maskllm.data.json_lines import document
from maskllm.data.text_files import check_inputs, read_lines
from maskllm.errors import MaskLLMError, first_line, whole_message
from maskllm.finetuning.labels import IGNORED
from maskllm.finetuning.settings import FinetuneSettings
from maskllm.finetuning.task import Example, padded
from maskllm.finetuning.writing import WritingTask
from maskllm.huggingface.loading import quiet_transformers


class SpeechTask(WritingTask):
    """A line of a manifest has `audio`, the path of a recording relative to the manifest, and `text`, what it says.

    A recording is read when its batch is made. It may have any sampling rate and number of channels.
    """

    name = "speech"
    model_class = AutoModelForSpeechSeq2Seq
    kind = "an encoder-decoder model of sound, such as Whisper"
    measure_name = "wer"
    higher_is_better = False

    def __init__(self, directory: Path, settings: FinetuneSettings) -> None:
        super().__init__(directory, settings)
        try:
            with quiet_transformers():
                self.features = AutoFeatureExtractor.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # transformers raises many types
            raise MaskLLMError(f"{directory}: transformers cannot read its feature extractor: {whole_message(error)}") from error
        self.window = getattr(self.features, "n_samples", None)
        """Samples in the window that Whisper hears at once; None for a model that takes any length."""
        frames = getattr(self.features, "nb_max_frames", None)
        positions = getattr(self.config, "max_source_positions", None)
        if self.window and positions and frames != 2 * positions:
            raise MaskLLMError(
                f"{directory}: its feature extractor gives {frames} frames (chunk_length {self.features.chunk_length} s), but its encoder "
                f"takes {2 * positions}; correct chunk_length in preprocessor_config.json"
            )
        self._set_language(settings.language)
        self.normalize = _normalizer(settings.normalizer, getattr(self.tokenizer, "english_spelling_normalizer", None))

    def _set_language(self, language: str | None) -> None:
        """Put the language and the task into the labels, where `generate` writes them.

        Raises MaskLLMError if a multilingual model has no language, or another model has one.
        """
        try:
            generation = GenerationConfig.from_pretrained(self.directory, local_files_only=True)
        except OSError:  # there is no such file
            generation = GenerationConfig()
        multilingual = getattr(generation, "is_multilingual", None)  # only Whisper's file has it
        if language is None:
            if multilingual:
                raise MaskLLMError(
                    f"{self.directory}: is a multilingual Whisper; give the language of the recordings, such as --language english"
                )
            return
        if not multilingual:
            found = "writes English only" if multilingual is False else "has no languages in its generation_config.json"
            raise MaskLLMError(f"--language {language}: {self.directory} {found}; leave it out")
        try:
            self.tokenizer.set_prefix_tokens(language=language, task="transcribe")
            self.tokenizer("")
        except Exception as error:
            raise MaskLLMError(f"--language {language}: the tokenizer cannot be set to it: {first_line(error)}") from error
        if self.tokenizer.prefix_tokens[1] not in generation.lang_to_id.values():
            known = ", ".join(name.strip("<|>") for name in generation.lang_to_id)
            raise MaskLLMError(f"--language {language}: the model does not have it; it has {known}")

    def read(self, files: Sequence[str], *, for_training: bool) -> Sequence[Example]:
        """Examples with `audio`, fp32 [samples] at the model's rate, `labels`, a list of tokens, and `reference`."""
        lines = []
        for line in read_lines(check_inputs(files)):
            audio, text = (document(line, key) for key in ("audio", "text"))
            where = f"{line.path}:{line.number}"
            if not text.strip():
                raise MaskLLMError(f"{where}: the text is empty; wanted what the recording says")
            path = line.path.parent / audio
            self._check(path, where)
            lines.append((path, where, text, self._labels(text, where)))
        if not lines:
            raise MaskLLMError(f"{files[0]}: has no recordings")
        self.check_tokens(labels for *_, labels in lines)
        return _Recordings(lines, self.features.sampling_rate)

    def _check(self, path: Path, where: str) -> None:
        """Raise MaskLLMError if a recording is missing, is no audio, has no samples or is longer than the model's window."""
        import soundfile

        if not path.is_file():
            raise MaskLLMError(f"{where}: {path}: no such file")
        try:
            info = soundfile.info(str(path))
        except soundfile.SoundFileError as error:
            raise MaskLLMError(
                f"{where}: {path}: not audio that soundfile can read: {first_line(error, with_type=False)}"
            ) from None
        if not info.frames:
            raise MaskLLMError(f"{where}: {path}: has no samples")
        rate = self.features.sampling_rate
        if self.window and info.frames * rate > self.window * info.samplerate:
            raise MaskLLMError(
                f"{where}: {path}: is {info.frames / info.samplerate:.1f} s long, but the model hears {self.window / rate:g} s at once; "
                "cut it"
            )

    def _labels(self, text: str, where: str) -> list[int]:
        labels = self.tokenizer(text)["input_ids"]
        if labels[0] == self.config.decoder_start_token_id:
            labels = labels[1:]  # the model puts it in front
        limit = min(self.settings.max_length, getattr(self.config, "max_target_positions", None) or len(labels))
        if len(labels) > limit:
            raise MaskLLMError(
                f"{where}: the text has {len(labels)} tokens, more than {limit} (--max-length, or the model's limit)"
            )
        return labels

    def collate(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The model's features, their `attention_mask` if it takes one, and `labels`, int64 [examples, tokens]."""
        batch = self.features(
            [example["audio"] for example in examples],
            sampling_rate=self.features.sampling_rate,
            padding="max_length" if self.window else True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {**batch, "labels": padded([example["labels"] for example in examples], IGNORED)}

    def generation_options(self) -> dict[str, Any]:
        """Whisper's language too, and no more tokens than its decoder has places beside its four first ones."""
        options = super().generation_options()
        if limit := getattr(self.config, "max_target_positions", None):
            options["max_new_tokens"] = max(1, min(options["max_new_tokens"], limit - 4))
        if self.settings.language is not None:
            options |= {"language": self.settings.language, "task": "transcribe"}
        return options

    def counts(self, reference: str) -> bool:
        """Whether the normalizer leaves anything of it: there is no error rate of nothing."""
        return bool(self.normalize(reference))

    def score(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        """The errors a word and a character of normalized texts."""
        import jiwer

        wanted, found = (list(map(self.normalize, texts)) for texts in (references, predictions))
        return {"wer": jiwer.wer(wanted, found), "cer": jiwer.cer(wanted, found)}

    def describe(self) -> dict[str, Any]:
        """The normalizer, and how the text was written."""
        return {"normalizer": self.settings.normalizer, "num_beams": self.settings.num_beams}


class _Recordings(Dataset):
    """Recordings with their texts and labels. One is read when it is asked for."""

    def __init__(self, lines: Sequence[tuple[Path, str, str, list[int]]], rate: int) -> None:
        """`lines`: paths, where each is named, texts and labels."""
        self._lines, self._rate = lines, rate

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, place: int) -> Example:
        path, where, text, labels = self._lines[place]
        return {"audio": read_audio(path, self._rate, where), "labels": labels, "reference": text}


def read_audio(path: Path, rate: int, where: str) -> np.ndarray:
    """A recording as fp32 [samples] at `rate` samples a second, the mean of its channels.

    Raises MaskLLMError if it cannot be read to its end, or has no samples or some that are not finite. It begins with `where`, the line
    that names the recording.
    """
    import soundfile
    import soxr

    try:
        samples, found = soundfile.read(str(path), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise MaskLLMError(
            f"{where}: {path}: is damaged; soundfile cannot read it to its end: {first_line(error, with_type=False)}"
        ) from None
    if not len(samples) or not np.isfinite(samples).all():
        raise MaskLLMError(f"{where}: {path}: {'has samples that are not numbers' if len(samples) else 'has no samples'}")
    return soxr.resample(samples.mean(axis=1), found, rate).astype(np.float32)


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _normalizer(name: str, spellings: dict[str, str] | None) -> Callable[[str], str]:
    if name == "digits":  # Whisper's would join number words, and drop some
        return lambda text: " ".join(re.sub("[^0-9]", "", _DIGIT_WORD.sub(_digit, text.lower())))
    normalize = EnglishTextNormalizer(spellings or {}) if name == "english" else BasicTextNormalizer()
    return lambda text: normalize(text).strip()


_DIGIT_WORD = re.compile(rf"\b({'|'.join(DIGITS)})\b")


def _digit(word: re.Match) -> str:
    return str(DIGITS.index(word[0]))
