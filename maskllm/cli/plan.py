"""`maskllm plan`."""

from __future__ import annotations

import argparse
import math

from maskllm.cli.options import writable_file
from maskllm.cli.train_options import add_options, option_values
from maskllm.errors import MaskLLMError, flag
from maskllm.planning.cost import GPUS, Cluster
from maskllm.planning.models import BUILT_IN
from maskllm.training.arguments import TrainArguments

TRAINING_OPTIONS = (
    "pattern", "train", "weights_optimizer", "train_embeddings", "kl_loss_coeff", "kl_temperature", "squarehead_loss_coeff", "teacher",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel", "use_distributed_optimizer",
    "micro_batch_size", "global_batch_size", "params_dtype", "mask_logits_dtype", "optimizer_state_dtype",
    "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
)  # fmt: skip
"""The training options that change memory or time. `--seq-length` does too; it is defined below, since its default differs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "--model", required=True, metavar="NAME_OR_DIR", help=f"a Hugging Face directory or hub id, or one of {', '.join(BUILT_IN)}"
    )
    parser.add_argument("--num-gpus", type=int, metavar="K", help="number of ranks; default: tensor x pipeline parallel size")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100-80gb", help="the GPU to plan for")
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GB",
        help="memory that a rank may use, in 10^9 bytes; default: the GPU's, or with --device cpu a rank's share of this machine's",
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="K", help="GPUs that are connected by their own links")
    parser.add_argument(
        "--network-bandwidth",
        type=float,
        default=50.0,
        metavar="GB",
        help="bandwidth from one GPU to other nodes in one direction, in 10^9 bytes/s",
    )
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="cpu: plan the memory of processes beyond their imported libraries, and no time",
    )
    parser.add_argument("--json", type=writable_file, metavar="FILE", help="write the numbers, in bytes and seconds")
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="S",
        help=f"tokens in a sequence; default: {TrainArguments.seq_length}, or the model's context if that is shorter",
    )
    add_options(parser, TRAINING_OPTIONS)


def run(args: argparse.Namespace) -> None:
    """Plan and print."""
    import psutil

    from maskllm.files import write_json
    from maskllm.planning.models import named_model
    from maskllm.planning.plan import plan
    from maskllm.planning.text import plan_lines

    model = named_model(args.model)
    if args.seq_length is None:
        args.seq_length = min(TrainArguments.seq_length, model.context)
    arguments = TrainArguments(**option_values(vars(args)))
    arguments.check_settings()
    if args.num_gpus is not None and args.num_gpus < 1:
        raise MaskLLMError(f"--num-gpus: found {args.num_gpus}, wanted at least 1")
    if args.gpus_per_node < 1:
        raise MaskLLMError(f"--gpus-per-node: found {args.gpus_per_node}, wanted at least 1")
    for name in ("gpu_memory", "network_bandwidth"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise MaskLLMError(f"{flag(name)}: found {value}, wanted a positive number")
    ranks = args.num_gpus or arguments.tensor_model_parallel_size * arguments.pipeline_model_parallel_size
    if args.device == "cuda":
        gpu, memory = args.gpu, GPUS[args.gpu].memory
        cluster = Cluster(GPUS[gpu], args.gpus_per_node, args.network_bandwidth * 1e9)
    else:
        gpu, memory, cluster = None, psutil.virtual_memory().total / ranks, None
    if args.gpu_memory is not None:
        memory = args.gpu_memory * 1e9
    found = plan(model, arguments, num_gpus=ranks, gpu_bytes=memory, cluster=cluster)
    if args.json is not None:
        write_json(args.json, found.report(model))
    print("\n".join(plan_lines(found, model, args.model, gpu)))
