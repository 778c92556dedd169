"""`torchrun ... -m maskllm.train`: train the masks of a Megatron checkpoint, its weights, or both, on one process or many.

The whole run on one page: parse, open this rank's output, join the other ranks, build, train, and close on every path.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from maskllm.training.arguments import TrainArguments

PROGRAM = "maskllm.train"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, train; returns the exit status.

    0 done; 1 failed; 2 bad usage; 75 stopped by SIGTERM, SIGINT or SIGHUP, and saved if there is a `--save` and was a good step; 130
    interrupted before the first step.
    """
    import megatron_patches

    megatron_patches.import_megatron()
    from maskllm.cli.train_options import parse_arguments
    from maskllm.failures import report, usage_said_once
    from maskllm.megatron.process_groups import run_in_group
    from maskllm.output_lock import output_lock
    from maskllm.training.surviving.rank_output import rank_output

    rank = int(os.environ.get("RANK", "0"))
    console: TextIO = sys.stderr
    with contextlib.ExitStack() as stack:
        try:
            with usage_said_once():
                arguments = parse_arguments(argv)
            arguments.check()  # before the processes wait for each other
            if arguments.save and rank == 0:
                stack.enter_context(output_lock(Path(arguments.save), "--save"))
            console = stack.enter_context(rank_output(arguments.save, rank))
            faulthandler.enable(all_threads=True)
            return run_in_group(
                lambda: _train(arguments, rank, console),
                tensor_model_parallel_size=arguments.tensor_model_parallel_size,
                pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
                timeout_minutes=arguments.distributed_timeout_minutes
                + 1,  # so that the watchdog, which can name the rank, is first
            )
        except SystemExit:
            raise
        except BaseException as error:
            return report(PROGRAM, error, console)


def _train(arguments: TrainArguments, rank: int, console: TextIO) -> int:
    """Train inside of the process group; returns the exit status."""
    import torch.distributed as dist

    from maskllm.distributed import job_store
    from maskllm.environment.cpu_speed import slow_dtype_warning
    from maskllm.environment.optional_parts import resolve_transformer_impl
    from maskllm.environment.startup import startup_line
    from maskllm.failures import report, say_failure
    from maskllm.training.loop import Trainer
    from maskllm.training.surviving.watchdog import Watchdog

    def give_up(line: str) -> None:
        say_failure(PROGRAM, line, console)
        time.sleep(2)  # so that the other ranks see it too, and log where they are
        os._exit(1)

    if rank == 0:
        implementation = resolve_transformer_impl(arguments.transformer_impl)
        own_adam = arguments.low_precision or arguments.uses_cast
        print(f"{PROGRAM}: {startup_line(implementation, own_adam=own_adam)}", file=console, flush=True)
        if slow := slow_dtype_warning(arguments.dtype):
            print(f"{PROGRAM}: {slow}", file=console, flush=True)
    store = job_store("heartbeats") or dist.HashStore()
    limit = arguments.distributed_timeout_minutes * 60
    watchdog = Watchdog(store, rank, dist.get_world_size(), limit=limit, give_up=give_up)
    with contextlib.ExitStack() as after_the_report:
        try:
            with watchdog:
                trainer = Trainer(arguments, console=console if rank == 0 else None, progress=watchdog.progress)
                after_the_report.callback(trainer.close)
                trainer.train()
        except BaseException as error:
            return report(PROGRAM, error, console, watchdog.describe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
