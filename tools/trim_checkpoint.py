"""Stand-alone form of `maskllm trim`."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["trim", *sys.argv[1:]]))
