"""The time to draw and apply every mask of a model, forward and backward: kernels against PyTorch operators, in one run.

    python -m benchmarks.masked_weight [--model smollm2-135m|llama-7b|tiny] [--device cpu|cuda] [--json FILE]

All layers of the model are in memory and take turns, as in a training step, so no layer finds its tensors in the cache. The share of the
copy bandwidth is the time in which a copy would move the bytes that a pass reads and writes, over the pass's time. A pass that is limited
by memory has a share near 1, and one that is limited by arithmetic a lower one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.machine import copy_bandwidth, describe
from maskllm.files import write_json
from maskllm.ops import NoiseKey, ShardMap, masked_weight, philox_key, reference
from maskllm.ops.extension import kernels
from maskllm.patterns import Pattern

# The linears of a transformer block as (out, in), and the number of blocks.
MODELS = {
    "smollm2-135m": ([(960, 576), (576, 576), (3072, 576), (576, 1536)], 30),
    "llama-7b": ([(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)], 1),
    "tiny": ([(64, 32)], 2),
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
        self.forward_bytes = 2 * self.weight.nbytes + self.logits.nbytes
        """Reads weights and logits, and writes the masked weights."""
        self.backward_bytes = 2 * self.weight.nbytes + 3 * self.logits.nbytes
        """Reads the gradient, weights and logits, and adds to the logits' gradient."""

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


class Timer:
    """The shortest of several timings, since other programs can only make one longer."""

    def __init__(self, device: str, repeats: int, clock: Callable[[], float]) -> None:
        self.device, self.repeats, self.clock = device, repeats, clock

    def __call__(
        self, work: Callable[[Layer], None], layers: list[Layer], *, before: Callable[[Layer], None] | None = None
    ) -> float:
        """The seconds of `work` on all layers; `before` runs on each of them first, and does not count."""
        best = float("inf")
        for _ in range(self.repeats):
            for layer in layers if before else ():
                before(layer)
            start = self._now()
            for layer in layers:
                work(layer)
            best = min(best, self._now() - start)
        return best

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def measure(model: str, device: str, repeats: int, clock: Callable[[], float]) -> dict:
    """The times in seconds for all layers of `model`."""
    shapes, count = MODELS[model]
    layers = [
        Layer(f"decoder.layers.{block}.{index}", out, inputs, device)
        for block in range(count)
        for index, (out, inputs) in enumerate(shapes)
    ]
    timer = Timer(device, repeats, clock)
    timer(Layer.forward, layers)  # warm up
    once = Timer(device, 1, clock)
    found = {
        "forward": timer(Layer.forward, layers),
        "backward": timer(Layer.backward, layers, before=Layer.forward),
        "operators": Timer(device, 2, clock)(operators_forward_backward, layers),
        "reference": once(Layer.reference_forward, layers) + once(Layer.reference_backward, layers),
    }
    kernel = found["forward"] + found["backward"]
    bandwidth = copy_bandwidth(device, clock)
    moved = {name: sum(getattr(layer, f"{name}_bytes") for layer in layers) for name in ("forward", "backward")}
    return {
        "instruction_set": kernels().instruction_set() if device == "cpu" and kernels() else device,
        "model": model,
        "masked_weights": sum(layer.weight.numel() for layer in layers),
        "seconds": found,
        "operators_over_kernels": found["operators"] / kernel,
        "reference_over_kernels": found["reference"] / kernel,
        "copy_bytes_a_second": bandwidth,
        "share_of_copy_bandwidth": {name: moved[name] / bandwidth / found[name] for name in moved},
        "clock": clock.__name__,
    }


def main(argv: list[str] | None = None) -> None:
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
    args = parser.parse_args(argv)
    if args.processor_time and args.device == "cuda":
        parser.error("--processor-time measures CPUs")
    clock = time.process_time if args.processor_time else time.perf_counter
    result = measure(args.model, args.device, args.repeats, clock)
    print(f"{describe()} ({result['instruction_set']}): {result['model']}, {result['masked_weights'] / 1e6:.0f} M masked weights")
    for name, value in result["seconds"].items():
        print(f"  {name:14} {value:8.3f} s")
    print(
        f"  PyTorch operators take {result['operators_over_kernels']:.1f} times as long, the reference "
        f"{result['reference_over_kernels']:.1f} times"
    )
    share = result["share_of_copy_bandwidth"]
    print(
        f"  a copy moves {result['copy_bytes_a_second'] / 1e9:.1f} GB/s; forward {share['forward']:.0%}, backward {share['backward']:.0%}"
    )
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
