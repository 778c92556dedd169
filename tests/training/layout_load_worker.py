"""Run by test_layouts in four ranks: load a trained checkpoint under many layouts and check each rank's part.

usage: python -m tests.training.layout_load_worker CHECKPOINT OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from maskllm.checkpoints.reading import Checkpoint, resolve
from maskllm.evaluation.megatron import load_masked_model
from maskllm.masking.draw import Draw, open_draw
from maskllm.masking.parameter import MaskedParameter
from maskllm.megatron.linears import masked_parameters
from maskllm.megatron.process_groups import parallel_processes
from maskllm.ops import NoiseKey, ShardMap, masked_weight, philox_key, winner_mask
from maskllm.patterns import Pattern, pack_mask

SAMPLE, SETTINGS = 5, {"scale": 200.0, "temperature": 1.0}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]
"""(tensor, pipeline) parallel sizes. The data-parallel size is four divided by both."""


def own_part(name: str, mask: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The part of a mask [out, in] that tensor-parallel rank `rank` holds.

    It is columns for a row-parallel linear, rows for a column-parallel one, and gate rows followed by up rows for a gated fc1.
    """
    if name.endswith(("linear_proj", "linear_fc2")):
        return mask.chunk(ranks, dim=1)[rank]
    if name.endswith("linear_fc1"):
        gate, up = mask.chunk(2)
        return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    return mask.chunk(ranks)[rank]


def is_own_part_of_the_draw(layer: MaskedParameter, checkpoint: Checkpoint, tp: int) -> bool:
    """Whether the masked weight of SAMPLE is, bit for bit, this rank's part of the masked weight in a single process."""
    layer.sampler.scale, layer.sampler.temperature = SETTINGS["scale"], SETTINGS["temperature"]
    with open_draw(Draw(SAMPLE)):
        found = layer.effective_weight()
    weight, logits = (checkpoint.tensors[f"{layer.location.name}.{kind}"].load() for kind in ("weight", "mask_logits"))
    key = NoiseKey(philox_key(layer.sampler.seed, layer.location.name), SAMPLE, ShardMap(logits.shape[1]))
    whole = masked_weight(weight.float(), logits, pattern=Pattern(2, 4), key=key, **SETTINGS)
    return torch.equal(found, own_part(layer.location.name, whole, parallel_state.get_tensor_model_parallel_rank(), tp))


def main(path: str, output: str) -> None:
    """Write OUTPUT-RANK.json: for each layout and masked linear here, whether its winner and its draw are those of the whole model."""
    found = {}
    for tp, pp in LAYOUTS:
        with parallel_processes(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp):
            checkpoint = resolve(path)
            model = load_masked_model(checkpoint, torch.float32)
            rank = dist.get_rank()
            same = {}
            for layer in masked_parameters(model):
                whole = winner_mask(checkpoint.tensors[f"{layer.location.name}.mask_logits"].load(), Pattern(2, 4))
                wanted = own_part(layer.location.name, whole, parallel_state.get_tensor_model_parallel_rank(), tp)
                same[layer.location.name] = (
                    torch.equal(layer.winner_bits(), pack_mask(wanted)),
                    is_own_part_of_the_draw(layer, checkpoint, tp),
                )
            found[f"{tp} {pp}"] = same
    Path(f"{output}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
