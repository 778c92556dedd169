"""Stand-alone form of `maskllm preprocess`."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
