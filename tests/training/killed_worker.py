"""`python -m maskllm.train`, each rank of which kills itself with SIGKILL after some steps, right before the next one.

usage: ranks(2, "tests.training.killed_worker", STEPS, ARGUMENTS...)
"""

from __future__ import annotations

import os
import signal
import sys

import megatron_patches

megatron_patches.import_megatron()

from maskllm.train import main  # noqa: E402
from maskllm.training.loop import Trainer  # noqa: E402
from maskllm.training.step import StepResult  # noqa: E402


def kill_after(steps: int) -> None:
    """Have this process die when `steps` steps are done."""
    one_step = Trainer._one_step

    def one_step_or_death(self: Trainer) -> StepResult:
        if self.iteration == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return one_step(self)

    Trainer._one_step = one_step_or_death


if __name__ == "__main__":
    kill_after(int(sys.argv.pop(1)))
    sys.exit(main())
