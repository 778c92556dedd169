"""Stand-alone form of `maskllm export`."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
