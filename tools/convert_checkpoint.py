"""Stand-alone form of `maskllm convert`."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
