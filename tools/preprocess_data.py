"""JSON lines to a Megatron indexed dataset: `maskllm preprocess` as a script."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
