"""The integers of a compressed checkpoint by calibration: block after block, on the inputs that the quantized blocks before it give."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from maskllm.export.block_weights import BlockWeights
from maskllm.huggingface.block_stream import BlockStream
from maskllm.huggingface.blocks import linears_of
from maskllm.huggingface.loading import context_of
from maskllm.ops.sparse_linear import Layout
from maskllm.pruning.calibration import Calibration
from maskllm.pruning.calls import BlockCall, block_calls
from maskllm.pruning.layerwise import Layer, advance, calibrate
from maskllm.pruning.quantize import QuantizedMatrix, quantize_matrices


class CalibratedBlocks:
    """The blocks of a causal language model, and calibration tokens. The weights of one block are in memory at a time.

    Raises MaskLLMError as `BlockStream` and `Calibration.tokens` do.
    """

    def __init__(self, directory: Path, weights: BlockWeights, calibration: Calibration, device: torch.device) -> None:
        self._weights = weights
        self._stream = BlockStream(directory, weights.tensors, dtype=calibration.params_dtype, device=device, load=weights.load)
        model = self._stream.model
        vocabulary = model.get_input_embeddings().num_embeddings
        self._tokens = calibration.tokens(directory, context=context_of(model.config), vocabulary=vocabulary)

    @torch.no_grad()
    def quantized(self, layouts: Mapping[str, Layout]) -> Iterator[tuple[str, QuantizedMatrix]]:
        """Quantize the blocks' weights that have a layout, by the names of their tensors.

        As in pruning, all matrices of a block are quantized on the inputs that they have in the block before.
        """
        stream, samples = self._stream, [{"input_ids": row} for row in self._tokens.split(1)]
        with stream.running() as model:  # through all blocks: they may get different arguments
            calls = block_calls(model, stream.blocks, samples[0], most=len(stream.blocks))
        first = dict(itertools.islice(stream.blocks.items(), 1))
        hidden = [block_calls(stream.model, first, sample, most=1)[0][1].hidden.cpu() for sample in samples]
        progress = tqdm(calls, desc="quantize", unit="layer", disable=None)
        for number, (name, call) in enumerate(progress, 1):
            if progress.disable:
                print(f"quantize: layer {number} of {len(calls)}, {name}", file=sys.stderr, flush=True)
            block = stream.blocks[name]
            with stream.loaded(block):
                linears = {stream.tensor(f"{path}.weight"): linear for path, linear in linears_of(block, name).items()}
                stored = {tensor: self._weights.matrix(tensor) for tensor in linears if tensor in layouts}
                forward = functools.partial(_forward, block, call)
                layer = Layer(forward, {tensor: linears[tensor] for tensor in stored}, stored)
                for tensor, matrix in _quantize(layer, hidden, layouts):
                    layer.weight(tensor).copy_(matrix.weight)
                    yield tensor, matrix
                advance(Layer(forward, linears, {}), hidden)


def _forward(block: torch.nn.Module, call: BlockCall, _sample: int, hidden: torch.Tensor) -> torch.Tensor:
    """The block's output. All samples have the same length, so the other arguments are those of the first one."""
    return call.output(block, hidden)


def _quantize(layer: Layer, hidden: list[torch.Tensor], layouts: Mapping[str, Layout]) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Quantize the linears of `layer`, those with the same input together."""
    if not layer.linears:
        return
    statistics = calibrate(layer, hidden, keep_outputs=False)
    groups: dict[int, list[str]] = {}
    for name, own in statistics.items():
        groups.setdefault(id(own), []).append(name)
    for names in groups.values():
        own = statistics[names[0]]
        for name in names:
            del statistics[name]
        weights = {name: layer.stored[name].to(layer.device) for name in names}
        yield from quantize_matrices(weights, own, layouts).items()
