"""Download the files of a Hugging Face checkpoint that a recipe needs: safetensors weights, and all other files but weights.

usage: python download.py ID DIRECTORY

This is Python code because versions of `hf download` differ in how they take several patterns.
"""

import sys

from maskllm.errors import MaskLLMError
from maskllm.huggingface.hub import NOT_DOWNLOADED, download

try:
    download(sys.argv[1], "directory", None, NOT_DOWNLOADED, to=sys.argv[2])
except MaskLLMError as error:
    sys.exit(str(error))
