"""Train a small T5 from scratch to translate, with a SentencePiece vocabulary of its own and transformers' `Seq2SeqTrainer`.

    python examples/finetune/train_t5.py --train train.en train.de --validation val.en val.de --test test.en test.de --output t5

The files hold a sentence a line, pair by pair, plain or gzip-compressed. A run that was stopped goes on from its last
checkpoint. `OUTPUT/result.json` has the BLEU of the test set.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import sacrebleu
import sentencepiece
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers.trainer_utils import get_last_checkpoint


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, plain or `.gz`."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def train_tokenizer(sentences: list[str], vocabulary_size: int, folder: Path) -> T5Tokenizer:
    """A unigram vocabulary of both languages, in T5's layout: <pad>, </s> and <unk> are tokens 0, 1 and 2."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "spiece"),
        vocab_size=vocabulary_size,
        normalization_rule_name="identity",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=128)
    for sentence in sentences[:100]:
        assert tokenizer(sentence).input_ids == [*pieces.encode(sentence), 1], f"the tokenizers differ: {sentence!r}"
    tokenizer.save_pretrained(folder)
    return tokenizer


class Pairs(torch.utils.data.Dataset):
    """Tokenized pairs of sentences."""

    def __init__(self, files: list[Path], tokenizer: T5Tokenizer) -> None:
        source, target = (read_lines(path) for path in files)
        if len(source) != len(target):
            raise SystemExit(f"{files[0]} has {len(source)} lines, {files[1]} has {len(target)}; they must pair line by line")
        self.references = target
        self.examples = [
            {"input_ids": s, "labels": t} for s, t in zip(tokenizer(source).input_ids, tokenizer(target).input_ids, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.examples[index]


def translate(model: T5ForConditionalGeneration, pairs: Pairs, tokenizer: T5Tokenizer, batch: int = 50) -> list[str]:
    """Greedy translations, in the order of the pairs; sorted by length inside, so that a batch has little padding."""
    model.eval()
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i]["input_ids"]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        inputs = tokenizer.pad({"input_ids": [pairs[i]["input_ids"] for i in picked]}, return_tensors="pt")
        tokens = model.generate(**inputs.to(model.device), max_new_tokens=60)
        texts |= dict(zip(picked, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True))
    return [texts[i] for i in range(len(pairs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split in ("train", "validation", "test"):
        parser.add_argument(f"--{split}", nargs=2, type=Path, required=True, metavar=("SOURCE", "TARGET"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocabulary-size", type=int, default=4000)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--d-ff", type=int, default=512)
    parser.add_argument("--layers", type=int, default=3, help="of the encoder, and as many of the decoder")
    parser.add_argument("--heads", type=int, default=3, help="of 64 dimensions each")
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs a step")
    parser.add_argument("--learning-rate", type=float, default=3e-2, help="of Adafactor, a share of each matrix's size")
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--save-steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    started = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    both = read_lines(args.train[0]) + read_lines(args.train[1])
    tokenizer = train_tokenizer(both, args.vocabulary_size, args.output)
    train, validation, test = (Pairs(files, tokenizer) for files in (args.train, args.validation, args.test))
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=args.d_model,
        d_kv=64,
        d_ff=args.d_ff,
        num_layers=args.layers,
        num_decoder_layers=args.layers,
        num_heads=args.heads,
        dropout_rate=0.1,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train)} pairs", flush=True)
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            output_dir=str(args.output / "checkpoints"),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=100,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            lr_scheduler_type="linear",
            label_smoothing_factor=0.1,
            max_grad_norm=1.0,
            train_sampling_strategy="group_by_length",
            logging_steps=50,
            eval_strategy="steps",
            eval_steps=4 * args.save_steps,
            save_steps=args.save_steps,
            save_total_limit=1,
            seed=args.seed,
            report_to="none",
            disable_tqdm=True,  # the log lines are enough
            dataloader_pin_memory=False,
        ),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        # T5's matrices differ in size a hundredfold. Adam, with one rate for all, needs several times as many steps.
        optimizers=(torch.optim.Adafactor(model.parameters(), lr=args.learning_rate), None),
    )
    checkpoints = args.output / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None)
    model.save_pretrained(args.output)
    translations = translate(model, test, tokenizer)
    bleu = sacrebleu.BLEU()
    score = bleu.corpus_score(translations, [test.references])
    (args.output / "test.hypotheses.txt").write_text("".join(f"{line}\n" for line in translations), encoding="utf-8")
    result = {"bleu": score.score, "signature": str(bleu.get_signature()), "steps": trainer.state.global_step}
    result |= {"seconds": round(time.time() - started), "settings": {k: str(v) for k, v in vars(args).items()}}
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"BLEU {score.score:.2f} on {len(test)} pairs ({bleu.get_signature()})")


if __name__ == "__main__":
    main()
