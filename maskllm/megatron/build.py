"""Build this rank's part of a model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from maskllm.distributed import device
from maskllm.errors import MaskLLMError
from maskllm.families.model_config import ModelConfig
from maskllm.megatron.gpt import MaskedGPTModel
from maskllm.megatron.linears import hold_masked_parameters
from maskllm.megatron.spec import block_spec
from maskllm.megatron.transformer_config import gpt_model_arguments, set_rotary_frequencies, transformer_config


def build_model(
    model_config: ModelConfig,
    *,
    params_dtype: torch.dtype,
    sequence_parallel: bool = False,
    transformer_impl: str = "local",
    recomputation: dict[str, Any] | None = None,
) -> MaskedGPTModel:
    """This rank's pipeline stage and tensor-parallel shard of the model: dense, frozen, with weights not yet loaded.

    Call it inside of `maskllm.megatron.process_groups.parallel_processes`.

    Args:
        transformer_impl: local or transformer_engine (`maskllm.environment.optional_parts.TRANSFORMER_IMPLS`).
        recomputation: the fields of `TransformerConfig` that say which activations are recomputed; none by default.

    Raises MaskLLMError if the parallel sizes, or the layers that are recomputed together, do not divide the model.
    """
    pp_size = parallel_state.get_pipeline_model_parallel_world_size()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    if model_config.num_layers % pp_size:
        raise MaskLLMError(f"pipeline-model-parallel size {pp_size} does not divide the model's {model_config.num_layers} layers")
    model_config = model_config.padded(tp_size)
    recomputation = recomputation or {}
    check_recomputation(recomputation, model_config.num_layers // pp_size)
    config = transformer_config(
        model_config,
        params_dtype=params_dtype,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        pipeline_dtype=params_dtype,
        sequence_parallel=sequence_parallel and tp_size > 1,
        **recomputation,
    )
    model = MaskedGPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, parallel_state.get_pipeline_model_parallel_rank(), transformer_impl),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        unpadded_vocab_size=model_config.vocab_size,
        **gpt_model_arguments(model_config),
    )
    hold_masked_parameters(model, model_config)
    set_rotary_frequencies(model, model_config)
    # Upstream makes all parameters on the right device in the right dtype, except learned positions: host, fp32.
    return model.to(device(), params_dtype).requires_grad_(False)


def check_recomputation(recomputation: dict[str, Any], num_layers: int) -> None:
    """Raise MaskLLMError if a pipeline stage's `num_layers` layers cannot be recomputed in groups of the requested size."""
    group = recomputation.get("recompute_num_layers")
    method = recomputation.get("recompute_method")
    if method == "uniform" and num_layers % group:
        raise MaskLLMError(
            f"--recompute-num-layers {group}: with --recompute-method uniform wanted a divisor of a pipeline stage's {num_layers} layers"
        )
    if method == "block" and group > num_layers:
        raise MaskLLMError(f"--recompute-num-layers {group}: wanted at most a pipeline stage's {num_layers} layers")
