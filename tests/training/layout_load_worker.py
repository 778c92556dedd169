"""Run under torchrun by test_layouts, in four processes: load a trained checkpoint under many layouts and look at each rank's part.

usage: python -m tests.training.layout_load_worker CHECKPOINT OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from maskllm.distributed import parallel_processes
from maskllm.evaluation.megatron import load_masked_model
from maskllm.layers.spec import masked_linears
from maskllm.models.checkpoint import resolve
from maskllm.ops import winner_mask
from maskllm.patterns import Pattern

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4)]
"""(tensor, pipeline) parallel sizes; the rest of the four ranks is data parallel."""


def own_part(name: str, mask: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """What tensor-parallel rank `rank` holds of a mask [out, in]: columns of row-parallel linears, else rows, of gate and up apart."""
    if name.endswith(("linear_proj", "linear_fc2")):
        return mask.chunk(ranks, dim=1)[rank]
    if name.endswith("linear_fc1"):
        gate, up = mask.chunk(2)
        return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    return mask.chunk(ranks)[rank]


def main(path: str, output: str) -> None:
    """Write to OUTPUT-RANK.json, per layout, the masked linears of this rank and whether their winners are those of the checkpoint."""
    found = {}
    for tp, pp in LAYOUTS:
        with parallel_processes(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp):
            checkpoint = resolve(path)
            model = load_masked_model(checkpoint, torch.float32)
            rank = dist.get_rank()
            same = {}
            for layer in masked_linears(model):
                whole = winner_mask(checkpoint.tensors[f"{layer.name}.mask_logits"].load(), Pattern(2, 4))
                wanted = own_part(layer.name, whole, parallel_state.get_tensor_model_parallel_rank(), tp)
                same[layer.name] = torch.equal(layer.winner(), wanted)
            found[f"{tp} {pp}"] = same
    Path(f"{output}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
