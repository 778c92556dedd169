"""`maskllm evaluate` as a script, like those in Megatron-LM's tools/."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
