"""Make a speech task from recordings of single digits: strings of digits, as manifests for `maskllm finetune --task speech`.

    python examples/finetune/spoken_digits.py spoken-digits.zip digits/

The zip file has `train/DIGIT_SPEAKER_NUMBER.wav` and `test/...` (mono, 16 bits, one rate: the Free Spoken Digit Dataset, its recordings
split). Each string is of one speaker; its digits are joined with short silences. A string's recordings all come from its own split.

Written: `digits/train.jsonl` and `digits/test.jsonl`, a line a string: {"audio": "train/00000.wav", "text": "7 9 0 3 1"}, with the
path relative to the manifest; and the WAV files. The same arguments write the same files.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import wave
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from maskllm.files import write_text


def read_recordings(archive: zipfile.ZipFile, split: str) -> tuple[dict[str, list[tuple[int, bytes]]], int]:
    """A split's recordings by speaker, each a digit and its 16-bit samples; and their sampling rate in Hz."""
    speakers, rates = defaultdict(list), set()
    for name in sorted(archive.namelist()):
        if name.startswith(f"{split}/") and name.endswith(".wav"):
            digit, speaker, _number = Path(name).stem.split("_")
            with wave.open(io.BytesIO(archive.read(name))) as file:
                if (file.getnchannels(), file.getsampwidth()) != (1, 2):
                    raise SystemExit(f"{name}: wanted mono with 16 bits")
                speakers[speaker].append((int(digit), file.readframes(file.getnframes())))
                rates.add(file.getframerate())
    if len(rates) != 1:
        raise SystemExit(f"{split}/: wanted WAV files of one sampling rate, found rates {sorted(rates)}")
    return dict(speakers), rates.pop()


def endless(recordings: list[tuple[int, bytes]], draw: random.Random) -> Iterator[tuple[int, bytes]]:
    """All recordings in random order, then all again in another: each is used about equally often."""
    while True:
        yield from draw.sample(recordings, len(recordings))


def write_split(archive: zipfile.ZipFile, split: str, output: Path, strings: int, args: argparse.Namespace) -> None:
    speakers, rate = read_recordings(archive, split)
    draw = random.Random(f"{args.seed} {split}")
    streams = {speaker: endless(recordings, draw) for speaker, recordings in sorted(speakers.items())}
    (output / split).mkdir(parents=True, exist_ok=True)
    most = int(args.max_seconds * rate) * 2
    lines = []
    for number in range(strings):
        stream = streams[sorted(streams)[number % len(streams)]]
        while True:
            spoken = [next(stream) for _ in range(args.digits)]
            sound = bytes(2 * round(args.edge * rate))
            for place, (_, samples) in enumerate(spoken):
                pause = args.edge if place == args.digits - 1 else draw.uniform(*args.pause)
                sound += samples + bytes(2 * round(pause * rate))
            if len(sound) <= most:
                break
        name = f"{split}/{number:05}.wav"
        with wave.open(str(output / name), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(sound)
        lines.append(json.dumps({"audio": name, "text": " ".join(str(digit) for digit, _ in spoken)}) + "\n")
    write_text(output / f"{split}.jsonl", "".join(lines))  # prepare.sh looks for it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path, help="the zip file")
    parser.add_argument("output", type=Path)
    parser.add_argument("--train-strings", type=int, default=2000)
    parser.add_argument("--test-strings", type=int, default=200)
    parser.add_argument("--digits", type=int, default=5, help="of a string")
    parser.add_argument("--pause", type=float, nargs=2, default=(0.05, 0.25), help="seconds between digits, least and most")
    parser.add_argument("--edge", type=float, default=0.1, help="seconds of silence before the first digit and after the last")
    parser.add_argument("--max-seconds", type=float, default=4.9, help="longer strings are drawn again")
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    with zipfile.ZipFile(args.recordings) as archive:
        for split, strings in (("train", args.train_strings), ("test", args.test_strings)):
            write_split(archive, split, args.output, strings, args)
    print(f"wrote {args.output}/train.jsonl ({args.train_strings} strings) and test.jsonl ({args.test_strings})")


if __name__ == "__main__":
    main()
