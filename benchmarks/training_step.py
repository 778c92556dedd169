"""The time of a step of each way to train, against a step that trains the dense model's weights, in one process.

    python -m benchmarks.training_step --load CKPT [--ways WAY...] [--seq-length 512] [--sequences 4] [--repeats 3] [--json FILE]

CKPT is a dense checkpoint from `maskllm convert`. The ways:

* dense, dense-kl: train the weights of the blocks' linears without masks; with `-kl`, against a teacher (a frozen copy of the model).
* masks, masks-kl: learn the masks; the teacher is the same weights without masks.
* weights-kl: train the weights under a fixed mask, against the frozen copy.
* both, both-kl: masks and weights.

A step is forward, backward, gradient clipping and Adam, with frozen embeddings and norms. The loss with `-kl` is CE 2/3 + KL 1/3. Tokens
are random, since times do not depend on them. The dtype is fp32 on a CPU and bf16 on a GPU. The ways take turns, and the shortest time of
each counts, since other programs can only make it longer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from tqdm import tqdm

from benchmarks.machine import describe, wall_clock
from maskllm.checkpoints.reading import Checkpoint, load_model, resolve
from maskllm.distributed import device
from maskllm.files import write_json
from maskllm.masking.draw import Draw, open_draw
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model
from maskllm.megatron.distillation import StudentAndTeacher
from maskllm.megatron.linears import attach_logits, masked_linears
from maskllm.megatron.loss import LossTerms
from maskllm.megatron.process_groups import parallel_processes
from maskllm.patterns import Pattern

WAYS = ("dense", "dense-kl", "masks", "masks-kl", "weights-kl", "both", "both-kl")


def make_step(checkpoint: Checkpoint, tokens: torch.Tensor, way: str) -> Callable[[], None]:
    """A function that runs one optimizer step on `tokens`, int64 [sequences, sequence + 1], with one sequence per micro-batch."""
    trained, _, teacher = way.partition("-")
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    model = build_model(checkpoint.model_config, params_dtype=dtype)
    load_model(checkpoint, model)
    sampler = MaskSampler(pattern=Pattern(2, 4), seed=1234)
    sampler.temperature, sampler.scale = 4.0, 100.0
    sampler.weight_reg = 1e-5 / len(tokens)
    if trained in ("masks", "both", "weights"):
        attach_logits(model, sampler)
    for layer in masked_linears(model):
        if trained != "dense":
            layer.masked.reset()
        if trained == "weights":
            layer.masked.fix_winner()
            layer.masked.write_zeros()
        layer.weight.requires_grad_(trained != "masks")
    learner = model
    if teacher:
        copy = None
        if trained != "masks":
            copy = build_model(checkpoint.model_config, params_dtype=dtype).eval().requires_grad_(False)
            load_model(checkpoint, copy)
        learner = StudentAndTeacher(model, copy, LossTerms(ce=2 / 3, kl=1 / 3), squarehead=0.0)
        learner.micro_batches = len(tokens)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), learner)
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-9,
        clip_grad=1.0,
        bf16=trained != "masks" and dtype is torch.bfloat16,
        params_dtype=torch.float32 if trained == "masks" else dtype,
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="CKPT")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to time; all models are in memory together")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=4, help="micro-batches per step, of one sequence each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(argv)
    with parallel_processes():
        checkpoint = resolve(args.load)
        shape = (args.sequences, args.seq_length + 1)
        tokens = torch.randint(0, checkpoint.model_config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(
            device()
        )
        steps = {way: make_step(checkpoint, tokens, way) for way in args.ways}
        best = dict.fromkeys(steps, float("inf"))
        for repeat in tqdm(range(args.repeats + 1), desc="rounds"):
            for way, step in steps.items():
                taken = seconds(step)
                if repeat:  # the first round is warm-up
                    best[way] = min(best[way], taken)
        numbers = {
            "tokens": args.sequences * args.seq_length,
            "micro_batches": args.sequences,
            "seconds": best,
        }
    print(f"{describe()}, {numbers['tokens']} tokens per step in {args.sequences} micro-batches")
    for way, taken in best.items():
        dense = best.get("dense-kl" if way.endswith("-kl") else "dense")
        print(f"{way}: {taken:.2f} s" + (f", {taken / dense:.3f} of the dense step" if dense else ""))
    if args.json:
        write_json(args.json, numbers)


if __name__ == "__main__":
    main()
