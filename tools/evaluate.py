"""Stand-alone form of `maskllm evaluate`."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
