"""The Hugging Face files that the recipes need of a checkpoint on the hub: weights as safetensors, configs, tokenizer with its chat
templates, and licence.

usage: python download.py ID DIRECTORY

In Python, since versions of `hf download` differ in how they take more than one pattern.
"""

import sys

from huggingface_hub import snapshot_download

snapshot_download(
    sys.argv[1],
    local_dir=sys.argv[2],
    allow_patterns=["*.safetensors", "*.json", "tokenizer*", "*.jinja", "merges.txt", "LICENSE*"],
    ignore_patterns=["original/*"],
)
