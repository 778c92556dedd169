"""Run by test_layouts in several ranks: load a checkpoint under some layout, compute its logits and save it again.

usage: python -m tests.megatron.layout_worker SPEC TP PP DIRECTORY...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from maskllm.checkpoints.reading import resolve
from maskllm.checkpoints.saving import CheckpointSaver
from maskllm.errors import MaskLLMError
from maskllm.families.model_config import ModelConfig
from maskllm.megatron.build import build_model
from maskllm.megatron.gpt import MaskedGPTModel
from maskllm.megatron.process_groups import parallel_processes
from maskllm.megatron.transformer_config import gpt_model_arguments, set_rotary_frequencies, transformer_config


def upstream_model(config: ModelConfig, tensor_model_parallel_size: int = 1) -> GPTModel:
    """The model with Megatron's own layers instead of this project's."""
    model = GPTModel(
        config=transformer_config(config, params_dtype=torch.float32, tensor_model_parallel_size=tensor_model_parallel_size),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization=config.normalization),
        **gpt_model_arguments(config),
    )
    set_rotary_frequencies(model, config)
    return model


def logits(model: GPTModel, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """The model's logits [batch, sequence, vocab_size], on the last pipeline stage."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(*tokens.t().shape, model.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(tokens, positions, mask)
        if not parallel_state.is_pipeline_last_stage():
            dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        if isinstance(model, MaskedGPTModel):
            return output
        return tensor_parallel.gather_from_tensor_model_parallel_region(output)[..., :vocab_size]


def main(spec: str, tp: str, pp: str, *directories: str) -> None:
    """For the checkpoint `dense` in each directory, write logits.pt and the checkpoint CKPT beside it.

    Also try to save below a file, which must fail, and write each rank's error to failure-RANK.
    """
    with parallel_processes(tensor_model_parallel_size=int(tp), pipeline_model_parallel_size=int(pp)):
        for directory in map(Path, directories):
            checkpoint = resolve(directory / "dense")
            config = checkpoint.model_config
            if spec == "upstream":
                model = upstream_model(config, int(tp))
            else:
                model = build_model(config, params_dtype=torch.float32, sequence_parallel=spec == "sequence-parallel")
            model.eval()
            model.load_state_dict(checkpoint.load({"model": model.sharded_state_dict()})["model"])
            found = logits(model, torch.load(directory / "tokens.pt", weights_only=True), config.vocab_size)
            if found is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
                torch.save(found, directory / "logits.pt")
            state = model.sharded_state_dict(metadata={"dp_cp_group": parallel_state.get_data_parallel_group(True)})
            CheckpointSaver(directory / "CKPT", checkpoint.hf_directory).save(7, {"model": state}, checkpoint.info)
            try:
                CheckpointSaver(directory / "tokens.pt", checkpoint.hf_directory).save(7, {"model": state}, checkpoint.info)
            except (MaskLLMError, OSError) as error:
                (directory / f"failure-{dist.get_rank()}").write_text(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
