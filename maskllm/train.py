"""`torchrun ... -m maskllm.train`: learn the masks of a Megatron checkpoint, on one process or many."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, train; returns the exit status."""
    import megatron_patches

    megatron_patches.import_megatron()
    from maskllm.cli import run_guarded
    from maskllm.training.arguments import parse_arguments

    arguments = parse_arguments(argv)

    def run() -> None:
        arguments.check()  # before the processes wait for each other
        import torch.distributed as dist

        from maskllm.distributed import parallel_processes
        from maskllm.environment import resolve_transformer_impl, startup_line
        from maskllm.training.trainer import Trainer

        with parallel_processes(
            tensor_model_parallel_size=arguments.tensor_model_parallel_size,
            pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
            timeout_minutes=arguments.distributed_timeout_minutes,
        ):
            if dist.get_rank() == 0:
                print(f"maskllm.train: {startup_line(resolve_transformer_impl(arguments.transformer_impl))}", file=sys.stderr)
            Trainer(arguments).train()

    return run_guarded("maskllm.train", run)


if __name__ == "__main__":
    sys.exit(main())
