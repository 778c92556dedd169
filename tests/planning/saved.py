"""Which tensors autograd keeps for the backward pass of a small model. test_memory calls it, and runs it under torchrun for several
ranks.

usage: python -m tests.planning.saved OUTPUT TENSOR_PARALLEL_SIZE MODEL_JSON ARGUMENTS_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from maskllm.families.model_config import ModelConfig
from maskllm.masking.draw import Draw, open_draw
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model
from maskllm.megatron.distillation import StudentAndTeacher
from maskllm.megatron.linears import attach_bits, attach_logits, attach_scales, masked_parameters
from maskllm.megatron.loss import LossTerms
from maskllm.megatron.process_groups import parallel_processes
from maskllm.patterns import Pattern
from maskllm.planning.models import config_of
from maskllm.training.arguments import TrainArguments
from maskllm.training.trainables import parameter_groups


def kept(model_config: ModelConfig, arguments: TrainArguments) -> list[tuple[str, int]]:
    """(kind, bytes) of each storage that one forward pass with a loss keeps, without parameters.

    The kind is "masked" for a masked weight, and shape and dtype for anything else.
    """
    model = build_model(
        model_config,
        params_dtype=arguments.dtype,
        sequence_parallel=arguments.sequence_parallel,
        recomputation=arguments.recomputation(),
    )
    masked = masked_parameters(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    if arguments.trains_masks:
        sampler = MaskSampler(Pattern.parse(arguments.pattern), recompute_masked_weight=arguments.recomputes("masked_weight"))
        attach_logits(model, sampler)
        for parameter in masked:
            parameter.reset()
    elif arguments.uses_cast:
        attach_scales(model, MaskSampler(Pattern.parse(arguments.pattern)))
    else:
        attach_bits(model)
    parameter_groups(arguments, model, masked)
    models = [model]
    if arguments.has_separate_teacher:
        models.append(build_model(model_config, params_dtype=arguments.dtype, sequence_parallel=arguments.sequence_parallel).eval())
        models[1].load_state_dict({name: tensor for name, tensor in model.state_dict().items() if "mask" not in name}, strict=False)
    trained = model
    if arguments.distills:
        terms = LossTerms(arguments.ce_loss_coeff, arguments.kl_loss_coeff, arguments.kl_temperature)
        trained = StudentAndTeacher(model, models[1] if models[1:] else None, terms, arguments.squarehead_loss_coeff)
    known = {tensor.untyped_storage().data_ptr() for each in models for tensor in [*each.parameters(), *each.buffers()]}
    masked_shapes = {parameter.shape for parameter in masked}
    found: dict[int, tuple[str, int]] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kind = "masked" if tuple(tensor.shape) in masked_shapes else f"{list(tensor.shape)} {tensor.dtype}"
            found.setdefault(storage.data_ptr(), (kind, storage.nbytes()))
            alive.append(tensor)
        return tensor

    tokens = torch.randint(model_config.vocab_size, (arguments.micro_batch_size, arguments.seq_length))
    positions = torch.arange(arguments.seq_length).expand_as(tokens).contiguous()
    draw = Draw(0)
    with open_draw(draw), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trained(tokens, positions, None, labels=tokens).mean
        for target in draw.kept.values():  # functions that are computed again hold the draw
            pack(target)
    loss.backward()
    return list(found.values())


def main(output: str, tensor: str, model: str, arguments: str) -> None:
    """Write what the first rank keeps to `output`."""
    with parallel_processes(tensor_model_parallel_size=int(tensor)):
        found = kept(config_of(json.loads(model)), TrainArguments(**json.loads(arguments)))
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
