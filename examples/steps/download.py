"""Download the files of a Hugging Face checkpoint that a recipe needs: safetensors weights, configs, the tokenizer with its chat
templates, and the license.

usage: python download.py ID DIRECTORY

This is Python code because versions of `hf download` differ in how they take several patterns.
"""

import sys

from huggingface_hub import snapshot_download

PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "merges.txt", "LICENSE*"]

try:
    snapshot_download(sys.argv[1], local_dir=sys.argv[2], allow_patterns=PATTERNS, ignore_patterns=["original/*"])
except Exception as error:  # the hub's client also raises errors of requests and httpx
    sys.exit(
        f"{sys.argv[1]}: no such directory, and the hub does not give it: {(str(error).strip() or repr(error)).splitlines()[0]}"
    )
