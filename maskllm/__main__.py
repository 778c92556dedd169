"""`python -m maskllm` is the console command."""

import sys

from maskllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
