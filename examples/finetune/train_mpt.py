"""Train a small MPT (ALiBi, no biases) from scratch on JSON lines with `text`, with a tokenizer of its own and transformers' `Trainer`.

    python examples/finetune/train_mpt.py --train corpus/train.jsonl --held-out corpus/held_out.jsonl --output mpt

A run that was stopped goes on from its last checkpoint. `OUTPUT/result.json` has the perplexity of the held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import MptConfig, MptForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

END = "<|endoftext|>"


def read_texts(path: Path) -> list[str]:
    """The texts of a file of JSON lines."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(texts: list[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token=END, bos_token=END, unk_token=END, pad_token=END
    )


def windows(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> list[dict[str, torch.Tensor]]:
    """The documents one after the other, each with an end token, cut into windows of `length` tokens; the rest is left out."""
    tokens = [token for document in tokenizer(texts).input_ids for token in [*document, tokenizer.eos_token_id]]
    cut = torch.tensor(tokens[: len(tokens) // length * length]).reshape(-1, length)
    return [{"input_ids": window, "labels": window} for window in cut]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocabulary-size", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="windows a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    started = time.time()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    texts = read_texts(args.train)
    tokenizer = train_tokenizer(texts, args.vocabulary_size)
    tokenizer.save_pretrained(args.output)
    train, held_out = (windows(some, tokenizer, args.seq_length) for some in (texts, read_texts(args.held_out)))
    config = MptConfig(
        d_model=args.d_model,
        n_heads=args.heads,
        n_layers=args.layers,
        max_seq_len=2 * args.seq_length,
        vocab_size=len(tokenizer),
        use_cache=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = MptForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train) * args.seq_length:,} tokens", flush=True)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output / "checkpoints"),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            logging_steps=25,
            save_steps=args.save_steps,
            save_total_limit=1,
            seed=args.seed,
            report_to="none",
            disable_tqdm=True,  # the log lines are enough
            dataloader_pin_memory=False,
        ),
        train_dataset=train,
        eval_dataset=held_out,
    )
    checkpoints = args.output / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None)
    perplexity = math.exp(trainer.evaluate()["eval_loss"])
    model.config.use_cache = True
    model.save_pretrained(args.output)
    result = {"perplexity": perplexity, "windows": len(held_out), "parameters": parameters, "steps": trainer.state.global_step}
    result |= {"seconds": round(time.time() - started), "settings": {k: str(v) for k, v in vars(args).items()}}
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"perplexity {perplexity:.2f} on {len(held_out)} windows of {args.seq_length} tokens")


if __name__ == "__main__":
    main()
