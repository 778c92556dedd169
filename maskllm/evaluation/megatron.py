"""A Megatron checkpoint of any stage: its perplexity with Megatron's model, and its export for other evaluations."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from maskllm.checkpoints.reading import Checkpoint, load_model, resolve
from maskllm.data.tokenizer import load_tokenizer
from maskllm.distributed import device
from maskllm.dtypes import dtype_name
from maskllm.evaluation.candidates import Candidate
from maskllm.evaluation.huggingface import Evaluation
from maskllm.evaluation.perplexity import WindowNLLs, perplexity
from maskllm.evaluation.windows import read_windows
from maskllm.export.huggingface import export
from maskllm.export.trim import trim
from maskllm.families.model_config import check_context, check_vocabulary
from maskllm.masking.parameter import use_winners
from maskllm.masking.sampler import MaskSampler
from maskllm.megatron.build import build_model
from maskllm.megatron.gpt import MaskedGPTModel
from maskllm.megatron.linears import attach_bits, attach_logits, attach_scales, masked_parameters


def evaluate_checkpoint(
    load: str | os.PathLike,
    data: str | os.PathLike,
    *,
    seq_length: int,
    max_windows: int | None = None,
    data_format: str = "auto",
    params_dtype: torch.dtype | None = None,
) -> Evaluation:
    """Perplexity of a checkpoint on a text, with the checkpoint's tokenizer: dense, with its one-shot mask, or with its winners.

    Call it inside of `maskllm.megatron.process_groups.parallel_processes`, with all ranks in one tensor-parallel group. Arguments
    and errors are those of `evaluate_hf`. The default of `params_dtype` is fp32 on a CPU and bf16 on a GPU.
    """
    checkpoint = resolve(load)
    tokenizer = load_tokenizer(checkpoint.hf_directory, use_gigatoken=False)
    text = read_windows(data, tokenizer, seq_length, max_windows=max_windows, data_format=data_format)
    config = checkpoint.model_config
    check_vocabulary(text.tokens, config.vocab_size, str(data))
    check_context(seq_length, config.context)
    dtype = params_dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    model = load_masked_model(checkpoint, dtype)
    with use_winners(masked_parameters(model)):
        result = perplexity(megatron_window_nlls(model), text.windows)
        zeros = zero_share(model)
    return Evaluation(
        **dataclasses.asdict(result),
        text_tokens=len(text.tokens),
        data_kind=text.kind,
        dtype=dtype_name(dtype),
        device=device().type,
        zeros=zeros,
    )


def load_masked_model(checkpoint: Checkpoint, params_dtype: torch.dtype) -> MaskedGPTModel:
    """This rank's part of the model: with its logits or scales if it has any (see `use_winners`), else with its fixed mask, else dense."""
    model = build_model(checkpoint.model_config, params_dtype=params_dtype).eval()
    if checkpoint.has_mask_logits:
        first = masked_parameters(model)[0].location.name
        stored = checkpoint.tensors[f"{first}.mask_logits"].dtype
        attach_logits(model, MaskSampler(checkpoint.info.block_pattern), dtype=stored)
    elif checkpoint.has_weight_scales:
        attach_scales(model, MaskSampler(checkpoint.info.block_pattern))
    elif checkpoint.info.stage != "dense":
        attach_bits(model)
    load_model(checkpoint, model)
    return model


def megatron_window_nlls(model: MaskedGPTModel) -> WindowNLLs:
    """The model as a function for `perplexity`."""

    @torch.inference_mode()
    def window_nlls(windows: torch.Tensor) -> list[float]:
        windows = windows.to(device())
        positions = torch.arange(windows.shape[1], device=windows.device).expand_as(windows)
        # The last token too, as transformers gets it: some rotary frequencies depend on the length. Its loss does not count.
        losses = model(windows, positions, None, labels=windows.roll(-1, dims=1)).cross_entropy
        return losses[:, :-1].double().sum(1).tolist()

    return window_nlls


@torch.inference_mode()
def zero_share(model: MaskedGPTModel) -> float:
    """The share of zeros among the masked linears' effective weights, over all tensor-parallel ranks."""
    counts = torch.zeros(2, dtype=torch.float64, device=device())
    for parameter in masked_parameters(model):
        weight = parameter.effective_weight()
        counts += torch.tensor([(weight == 0).sum(), weight.numel()], dtype=torch.float64, device=device())
    dist.all_reduce(counts, group=parallel_state.get_tensor_model_parallel_group())
    return float(counts[0] / counts[1])


@contextlib.contextmanager
def exported(load: str | os.PathLike) -> Iterator[Candidate]:
    """A block with a Megatron checkpoint of any stage as a Hugging Face directory, which is removed at the end.

    A trained or pruned checkpoint is trimmed first. Raises MaskLLMError as `trim` and `export` do.
    """
    with tempfile.TemporaryDirectory(prefix="maskllm-export-") as folder:
        source = Path(load)
        if resolve(load).info.stage not in ("dense", "trimmed"):
            trim(load, Path(folder) / "trimmed")
            source = Path(folder) / "trimmed"
        export(source, Path(folder) / "hf")
        yield Candidate(Path(load).absolute().name, str(load), directory=Path(folder) / "hf")
