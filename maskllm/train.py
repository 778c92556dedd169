"""`torchrun ... -m maskllm.train`: learn the masks of a Megatron checkpoint, on one process or many."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from maskllm.training.arguments import TrainArguments


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, train; returns the exit status.

    0 done, 1 failed, 2 bad usage, 75 stopped by SIGTERM or SIGINT with everything saved, 130 interrupted before there was anything to save.
    """
    import megatron_patches

    megatron_patches.import_megatron()
    import torch

    from maskllm.distributed import parallel_processes
    from maskllm.errors import StoppedError
    from maskllm.training.failures import report
    from maskllm.training.output_lock import output_lock
    from maskllm.training.rank_output import rank_output

    rank = int(os.environ.get("RANK", "0"))
    arguments = _parse(argv, rank)
    console: TextIO = sys.stderr
    with contextlib.ExitStack() as stack:
        try:
            arguments.check()  # before the processes wait for each other
            if arguments.save and rank == 0:
                stack.enter_context(output_lock(Path(arguments.save)))
            console = stack.enter_context(rank_output(arguments.save, rank))
            faulthandler.enable(all_threads=True)
            with parallel_processes(
                tensor_model_parallel_size=arguments.tensor_model_parallel_size,
                pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
                timeout_minutes=arguments.distributed_timeout_minutes + 1,  # the watchdog, which can name the rank, comes first
            ):
                status = _train(arguments, rank, console)
                if status not in (0, StoppedError.exit_status) and torch.cuda.is_available():
                    # NCCL's groups go down together, and the others may be waiting for this rank somewhere else.
                    sys.stderr.flush()
                    os._exit(status)
                return status
        except BaseException as error:
            return report(error, console)


def _parse(argv: Sequence[str] | None, rank: int) -> TrainArguments:
    """Read the command line, with the parser's complaint printed once in the job."""
    from maskllm.training.arguments import parse_arguments
    from maskllm.training.failures import is_first_failure

    complaint, help_text = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(help_text):
            return parse_arguments(argv)
    except SystemExit as stop:
        if rank == 0:
            print(help_text.getvalue(), end="", flush=True)
        if stop.code and is_first_failure():
            print(complaint.getvalue(), end="", file=sys.stderr, flush=True)
        raise


def _train(arguments: TrainArguments, rank: int, console: TextIO) -> int:
    """Train inside the process group, and report a failure before the group goes down and takes the other ranks along."""
    import torch.distributed as dist

    from maskllm.distributed import job_store
    from maskllm.environment import resolve_transformer_impl, startup_line
    from maskllm.training.failures import PROGRAM, report, say_failure
    from maskllm.training.trainer import Trainer
    from maskllm.training.watchdog import Watchdog

    def give_up(line: str) -> None:
        say_failure(line, console)
        time.sleep(2)  # for the others to see it too, and to write down where they are
        os._exit(1)

    if rank == 0:
        print(f"{PROGRAM}: {startup_line(resolve_transformer_impl(arguments.transformer_impl))}", file=console, flush=True)
    store = job_store("heartbeats") or dist.HashStore()
    limit = arguments.distributed_timeout_minutes * 60
    watchdog = Watchdog(store, rank, dist.get_world_size(), limit=limit, give_up=give_up)
    try:
        with watchdog:
            Trainer(arguments, console=console if rank == 0 else None, progress=watchdog.progress).train()
    except BaseException as error:
        return report(error, console, watchdog.describe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
