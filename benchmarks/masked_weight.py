"""The time to draw and apply every mask of a model, forward and backward: kernels against PyTorch operators, in one run.

    python -m benchmarks.masked_weight [--model smollm2-135m|llama-7b] [--device cpu|cuda] [--json FILE]

For comparison it also measures a copy that moves the same number of bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.machine import describe
from maskllm.files import write_json
from maskllm.ops import NoiseKey, ShardMap, masked_weight, philox_key, reference
from maskllm.ops.extension import kernels
from maskllm.patterns import Pattern

# The linears of a transformer block as (out, in), and the number of blocks.
MODELS = {
    "smollm2-135m": ([(960, 576), (576, 576), (3072, 576), (576, 1536)], 30),
    "llama-7b": ([(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)], 1),
}
PATTERN = Pattern(2, 4)
DRAW = {"scale": 100.0, "temperature": 4.0, "weight_reg": 1e-5}


class Layer:
    """The tensors of a masked layer: bf16 weight, fp32 logits with their gradient buffer, and a gradient of the masked weight."""

    def __init__(self, name: str, out: int, inputs: int, device: str) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        options = {"device": device, "generator": generator}
        self.weight = (torch.randn(out, inputs, **options) * 0.02).bfloat16()
        self.logits = torch.nn.Parameter(torch.randn(out, inputs // 4, 6, **options) * 0.01)
        self.logits.main_grad = torch.zeros_like(self.logits, requires_grad=False)
        self.grad = (torch.randn(out, inputs, **options) * 1e-3).bfloat16()
        self.key = NoiseKey(philox_key(0, name), 0, ShardMap(inputs // 4))

    def forward(self) -> None:
        self.masked = masked_weight(self.weight, self.logits, pattern=PATTERN, key=self.key, **DRAW)

    def backward(self) -> None:
        self.masked.backward(self.grad)

    def reference_forward(self) -> None:
        arguments = (self.weight, self.logits.detach(), PATTERN, self.key, DRAW["scale"], DRAW["temperature"], False, False)
        reference.forward(*arguments)

    def reference_backward(self) -> None:
        arguments = (self.grad, self.weight, self.logits.detach(), PATTERN, self.key)
        self.logits.main_grad += reference.backward(*arguments, *DRAW.values(), False)[0]


def operators_forward_backward(layer: Layer) -> None:
    """The mask as framework code usually computes it: Gumbel noise from torch's generator, softmax, product, and autograd."""
    logits = layer.logits.detach().requires_grad_()
    uniform = torch.rand_like(logits).clamp_(1e-7, 1 - 1e-7)
    noise = -torch.log(-torch.log(uniform))
    probability = torch.softmax((DRAW["scale"] * logits + noise) / DRAW["temperature"], -1)
    mask = (probability @ PATTERN.candidates(device=logits.device)).flatten(1)
    masked = (layer.weight * mask).bfloat16()
    loss = (masked.float() * layer.grad.float()).sum() - DRAW["weight_reg"] * masked.float().square().sum()
    loss.backward()
    layer.logits.main_grad += logits.grad


def seconds(work: Callable[[], None], device: str, repeats: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of `repeats` timings, since other programs can only make one longer."""
    best = float("inf")
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def measure(model: str, device: str, repeats: int, clock: Callable[[], float]) -> dict:
    """The times in seconds for all layers of `model`. Each shape is measured once and counted as often as it occurs."""
    shapes, count = MODELS[model]
    totals = dict.fromkeys(("forward", "backward", "operators", "reference", "copy_forward", "copy_backward"), 0.0)
    weights = 0
    for index, (out, inputs) in enumerate(shapes):
        layer = Layer(f"decoder.layers.0.{index}", out, inputs, device)
        weights += count * out * inputs

        def both(layer: Layer = layer) -> None:
            layer.forward()
            layer.backward()

        def reference_both(layer: Layer = layer) -> None:
            layer.reference_forward()
            layer.reference_backward()

        both()
        layer.forward()
        forward = seconds(layer.forward, device, repeats, clock)
        totals["forward"] += count * forward
        totals["backward"] += count * max(seconds(both, device, repeats, clock) - forward, 0.0)
        totals["operators"] += count * seconds(lambda layer=layer: operators_forward_backward(layer), device, 2, clock)
        totals["reference"] += count * seconds(reference_both, device, 1, clock)
        # A copy reads and writes each byte. So copying half of the bytes that a pass moves takes the least time for the pass.
        moved = layer.weight.nbytes * 2 + layer.logits.nbytes
        for name, extra in (("copy_forward", 0), ("copy_backward", 2 * layer.logits.nbytes)):
            half = torch.empty((moved + extra) // 2, dtype=torch.uint8, device=device)
            target = torch.empty_like(half)
            totals[name] += count * seconds(lambda half=half, target=target: target.copy_(half), device, repeats, clock)
    kernel = totals["forward"] + totals["backward"]
    return {
        "machine": describe(),
        "instruction_set": kernels().instruction_set() if device == "cpu" and kernels() else device,
        "model": model,
        "masked_weights": weights,
        "seconds": {name: round(value, 4) for name, value in totals.items()},
        "operators_over_kernels": round(totals["operators"] / kernel, 1),
        "reference_over_kernels": round(totals["reference"] / kernel, 1),
        "share_of_copy_bandwidth": {
            "forward": round(totals["copy_forward"] / totals["forward"], 3),
            "backward": round(totals["copy_backward"] / totals["backward"], 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor seconds of all threads, which do not include other programs",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    if args.processor_time and args.device == "cuda":
        parser.error("--processor-time measures CPUs")
    clock = time.process_time if args.processor_time else time.perf_counter
    result = measure(args.model, args.device, args.repeats, clock) | {"clock": clock.__name__}
    print(
        f"{result['machine']} ({result['instruction_set']}): {result['model']}, {result['masked_weights'] / 1e6:.0f} M masked weights"
    )
    for name, value in result["seconds"].items():
        print(f"  {name:14} {value:8.3f} s")
    print(
        f"  PyTorch operators take {result['operators_over_kernels']} times as long, the reference {result['reference_over_kernels']} times"
    )
    share = result["share_of_copy_bandwidth"]
    print(f"  share of copy bandwidth: forward {share['forward']:.0%}, backward {share['backward']:.0%}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
