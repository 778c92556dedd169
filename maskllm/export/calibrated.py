"""The integers of a compressed checkpoint by calibration: block after block, on the inputs that the quantized blocks before it give."""

from __future__ import annotations

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
from maskllm.pruning.huggingface import layer_calls, layer_forward
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
        self._tokens = calibration.tokens(directory, context=context_of(model), vocabulary=vocabulary)

    @torch.no_grad()
    def quantized(self, layouts: Mapping[str, Layout]) -> Iterator[tuple[str, QuantizedMatrix]]:
        """Quantize the blocks' weights that have a layout, by the names of their tensors.

        As in pruning, all matrices of a block are quantized on the inputs that they have in the block before.
        """
        stream, blocks = self._stream, self._stream.blocks
        with stream.running() as model:  # one pass of the whole model: blocks may get different arguments
            calls = layer_calls(model, blocks, self._tokens[:1])
        hidden = [layer_calls(stream.model, blocks[:1], row)[0].hidden.cpu() for row in self._tokens.split(1)]
        names = {module: name for name, module in stream.model.named_modules()}
        for block, call in zip(tqdm(blocks, desc="quantize", unit="layer", disable=None), calls, strict=True):
            with stream.loaded(block):
                linears = {stream.tensor(f"{name}.weight"): linear for name, linear in linears_of(block, names[block]).items()}
                stored = {name: self._weights.matrix(name) for name in linears if name in layouts}
                layer = Layer(layer_forward(block, call), {name: linears[name] for name in stored}, stored)
                for name, matrix in _quantize(layer, hidden, layouts):
                    layer.weight(name).copy_(matrix.weight)
                    yield name, matrix
                advance(Layer(layer.forward, linears, {}), hidden)


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
