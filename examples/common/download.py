"""The Hugging Face files that the recipes need of a checkpoint on the hub: weights as safetensors, configs, tokenizer with its chat
templates, and licence.

usage: python download.py ID DIRECTORY

In Python, since versions of `hf download` differ in how they take more than one pattern.
"""

import sys

from huggingface_hub import snapshot_download

PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "merges.txt", "LICENSE*"]

try:
    snapshot_download(sys.argv[1], local_dir=sys.argv[2], allow_patterns=PATTERNS, ignore_patterns=["original/*"])
except Exception as error:  # the hub's client raises its own, requests' and httpx's errors
    sys.exit(
        f"{sys.argv[1]}: no such directory, and the hub does not give it: {(str(error).strip() or repr(error)).splitlines()[0]}"
    )
