"""The time of a step that learns masks, against a step that trains the same linears' weights directly, in one process.

    python benchmarks/masked_step.py --load CKPT [--seq-length 512] [--sequences 4] [--repeats 3] [--json FILE]

CKPT is a dense checkpoint from `maskllm convert`. Both steps are forward, backward, gradient clipping and Adam, with frozen
embeddings and norms. Tokens are random, since times do not depend on them. The dtype is fp32 on a CPU and bf16 on a GPU. The two
steps take turns, and the shortest time of each counts, since other programs can only make it longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from machine import describe, wall_clock
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from tqdm import tqdm

from maskllm.checkpoints.reading import Checkpoint, load_model, resolve
from maskllm.distributed import device
from maskllm.files import write_json
from maskllm.masking.draw import Draw, open_draw
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model
from maskllm.megatron.linears import attach_logits, masked_linears
from maskllm.megatron.process_groups import parallel_processes
from maskllm.patterns import Pattern


def make_step(checkpoint: Checkpoint, tokens: torch.Tensor, *, masked: bool) -> Callable[[], None]:
    """A function that runs one optimizer step on `tokens`, int64 [sequences, sequence + 1], with one sequence per micro-batch."""
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    model = build_model(checkpoint.model_config, params_dtype=dtype)
    load_model(checkpoint, model)
    sampler = MaskSampler(pattern=Pattern(2, 4), seed=1234)
    sampler.temperature, sampler.scale = 4.0, 100.0
    sampler.weight_reg = 1e-5 / len(tokens)
    if masked:
        attach_logits(model, sampler)
    for layer in masked_linears(model):
        if masked:
            layer.masked.reset()
        else:
            layer.weight.requires_grad_(True)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-9,
        clip_grad=1.0,
        bf16=not masked and dtype is torch.bfloat16,
        params_dtype=torch.float32 if masked else dtype,
    )
    optimizer = get_megatron_optimizer(config, [ddp])
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True  # as in training
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device)[None]

    def step() -> None:
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        sampler.stats = torch.zeros(2, device=tokens.device)
        for sample, sequence in enumerate(tokens[:, None]):
            with open_draw(Draw(sample)):
                losses = ddp(sequence[:, :-1], positions, None, labels=sequence[:, 1:])
            (losses.mean / len(tokens)).backward()
        ddp.finish_grad_sync()
        optimizer.step()

    return step


def seconds(work: Callable[[], None]) -> float:
    """The time of `work`."""
    start = wall_clock(device().type)
    work()
    return wall_clock(device().type) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="CKPT")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4, help="micro-batches per step, of one sequence each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    with parallel_processes():
        checkpoint = resolve(args.load)
        shape = (args.sequences, args.seq_length + 1)
        tokens = torch.randint(0, checkpoint.model_config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(
            device()
        )
        steps = {name: make_step(checkpoint, tokens, masked=name == "masked") for name in ("masked", "direct")}
        best = dict.fromkeys(steps, float("inf"))
        for repeat in tqdm(range(args.repeats + 1), desc="rounds"):
            for name, step in steps.items():
                taken = seconds(step)
                if repeat:  # the first round is warm-up
                    best[name] = min(best[name], taken)
        numbers = {
            "machine": describe(device().type),
            "torch": torch.__version__,
            "tokens": args.sequences * args.seq_length,
            "micro_batches": args.sequences,
            "seconds": best,
            "masked_over_direct": best["masked"] / best["direct"],
        }
    print(
        f"{numbers['machine']}, {numbers['tokens']} tokens per step in {args.sequences} micro-batches: masked "
        f"{best['masked']:.2f} s, direct {best['direct']:.2f} s, ratio {numbers['masked_over_direct']:.3f}"
    )
    if args.json:
        write_json(args.json, numbers)


if __name__ == "__main__":
    main()
