"""`maskllm` in a rank, with a patch.

usage: python -m tests.finetuning.patched_command sharded|failing ARGUMENTS

sharded: accelerate applies FSDP, as on GPUs. failing: the second process fails in its second step.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState

from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.finetuning import SparseTrainer
from tests.finetuning.worker import shard_on_cpus

_init, _step = AcceleratorState.__init__, SparseTrainer.training_step


def _sharded(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
    shard_on_cpus()
    _init(self, *args, **kwargs)


def _failing(self: SparseTrainer, *args: Any, **kwargs: Any) -> Any:
    if self.args.process_index == 1 and self.state.global_step == 1:
        raise MaskLLMError("the second process fails")
    return _step(self, *args, **kwargs)


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        AcceleratorState.__init__ = _sharded
    else:
        SparseTrainer.training_step = _failing
    sys.exit(main(sys.argv[2:]))
