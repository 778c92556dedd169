"""`maskllm convert` as a script, like those in Megatron-LM's tools/."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
