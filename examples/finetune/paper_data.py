"""Write the data of the sparse fine-tuning paper (arXiv 2310.06927) as files for `maskllm finetune`.

    python examples/finetune/paper_data.py wmt14 data/wmt14                                  # from the hub, by `datasets`
    python examples/finetune/paper_data.py gsm8k data/gsm8k                                  # from the hub, by `datasets`
    python examples/finetune/paper_data.py common-voice data/common-voice-hindi --source cv-corpus/hi   # a downloaded release

Written: train.en, train.de, test.en and test.de; train.jsonl and test.jsonl with `prompt` and `completion`; train.jsonl and test.jsonl
with `audio`, a path to the release's MP3 files, and `text`.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path


def write_json_lines(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def wmt14(output: Path) -> None:
    """English and German, a sentence a line. Line breaks inside of a sentence become spaces; pairs with an empty side are left out."""
    from datasets import load_dataset

    for split in ("train", "test"):
        with (output / f"{split}.en").open("w", encoding="utf-8") as en, (output / f"{split}.de").open("w", encoding="utf-8") as de:
            for row in load_dataset("wmt/wmt14", "de-en", split=split):
                english, german = (" ".join(row["translation"][language].split()) for language in ("en", "de"))
                if english and german:
                    en.write(english + "\n")
                    de.write(german + "\n")


def gsm8k(output: Path) -> None:
    """Questions as prompts, worked answers as completions."""
    from datasets import load_dataset

    for split in ("train", "test"):
        rows = load_dataset("openai/gsm8k", "main", split=split)
        write_json_lines(
            output / f"{split}.jsonl",
            ({"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"} for row in rows),
        )


def common_voice(output: Path, source: Path) -> None:
    """A language's folder of a Common Voice release: train.tsv and dev.tsv to train on, test.tsv to measure on, and clips/."""
    for split, tables in (("train", ("train", "dev")), ("test", ("test",))):
        rows = []
        for table in tables:
            with (source / f"{table}.tsv").open(encoding="utf-8", newline="") as file:
                rows += csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        clips = (source / "clips").resolve()
        write_json_lines(output / f"{split}.jsonl", ({"audio": str(clips / row["path"]), "text": row["sentence"]} for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["wmt14", "gsm8k", "common-voice"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--source", type=Path, help="common-voice: the language's folder of a release")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.data == "common-voice":
        if args.source is None:
            parser.error("common-voice: --source is needed")
        common_voice(args.output, args.source)
    else:
        {"wmt14": wmt14, "gsm8k": gsm8k}[args.data](args.output)


if __name__ == "__main__":
    main()
