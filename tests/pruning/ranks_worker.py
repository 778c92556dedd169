"""test_ranks runs this under torchrun: write a checkpoint under several layouts, then run `maskllm` commands, all in one job.

usage: python -m tests.pruning.ranks_worker DENSE JOB.json

JOB.json holds "layouts", a map of directory -> [tensor, pipeline] parallel sizes, and "commands", a list of command lines. Each
rank writes its exit statuses to JOB.json.RANK.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import megatron_patches

megatron_patches.import_megatron()

from maskllm.checkpoints.reading import load_model, resolve  # noqa: E402
from maskllm.checkpoints.saving import CheckpointSaver  # noqa: E402
from maskllm.cli import main as maskllm  # noqa: E402
from maskllm.megatron.build import build_model  # noqa: E402
from maskllm.megatron.process_groups import parallel_processes  # noqa: E402


def write_under(dense: str, directory: str, tensor: int, pipeline: int) -> None:
    """Load `dense` into a model under a layout and save it. The remaining ranks are data-parallel."""
    with parallel_processes(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline):
        checkpoint = resolve(dense)
        model = build_model(checkpoint.model_config, params_dtype=torch.bfloat16)
        load_model(checkpoint, model)
        state = {"model": model.sharded_state_dict()}
        CheckpointSaver(directory, checkpoint.hf_directory).save("release", state, checkpoint.info)


def main(dense: str, path: str) -> None:
    """Write the layouts, then run the commands."""
    job = json.loads(Path(path).read_text())
    for directory, (tensor, pipeline) in job["layouts"].items():
        write_under(dense, directory, tensor, pipeline)
    statuses = []
    for command in job["commands"]:
        try:
            statuses.append(maskllm(command))
        except SystemExit as usage:
            statuses.append(usage.code)
    Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main(*sys.argv[1:])
