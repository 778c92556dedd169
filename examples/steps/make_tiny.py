"""Make the inputs of MODEL=tiny: a random model of a family with a newly trained tokenizer, shards in the format of C4, and held-out text.

The text is the Python language reference in the standard library (`pydoc_data.topics`), so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pydoc_data.topics
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {
    "llama2": LLAMA,
    "llama3": LLAMA | GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": LLAMA
    | GROUPED
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "nemotron": LLAMA | GROUPED | {"model_type": "nemotron"},
    "gpt3": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--output", type=Path, required=True, help="directory of the Hugging Face checkpoint to write")
    parser.add_argument("--data", type=Path, required=True, help="directory to write c4/en and held_out.txt to")
    args = parser.parse_args()

    documents = sorted(pydoc_data.topics.topics.values())
    held_out, train = documents[::10], [text for number, text in enumerate(documents) if number % 10]
    shards = args.data / "c4" / "en"
    shards.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        with gzip.open(shards / f"c4-train.{number:05d}-of-01024.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in train[number::2])
    (args.data / "held_out.txt").write_text("\n\n".join(held_out), encoding="utf-8")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    tokenizer.train_from_iterator(
        train, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(args.output)

    torch.manual_seed(0)
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1}
    config = AutoConfig.for_model(**FAMILIES[args.family], **tokens)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(args.output)


if __name__ == "__main__":
    main()
