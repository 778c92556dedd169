"""Perplexity of a Hugging Face model: dense, sparse, or with a mask file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from maskllm.data.tokenizer import load_tokenizer
from maskllm.dtypes import dtype_name
from maskllm.environment.cpu_speed import computes_natively
from maskllm.errors import MaskLLMError, whole_message
from maskllm.evaluation.perplexity import Perplexity, WindowNLL, cut_windows, next_token_nll, perplexity
from maskllm.evaluation.text import read_evaluation_text
from maskllm.families.model_config import check_context, check_vocabulary
from maskllm.files import check_not_lfs_pointer
from maskllm.huggingface.blocks import linears_of, transformer_blocks
from maskllm.huggingface.config import load_config
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.mask_file import open_mask_file
from maskllm.huggingface.tensors import HFTensors, weight_files


@dataclass(frozen=True)
class Evaluation(Perplexity):
    """The perplexity of a model on a text, and what was evaluated."""

    text_tokens: int
    """Tokens in the whole text, including those outside of the evaluated windows."""
    data_kind: str
    """How the text was read; see `read_evaluation_text`."""
    dtype: str
    """The dtype that the model computed in."""
    device: str
    zeros: float
    """The share of zeros among the weights of the transformer blocks' linear layers."""


def evaluate_hf(
    model: str | os.PathLike,
    data: str | os.PathLike,
    *,
    seq_length: int,
    max_windows: int | None = None,
    mask_file: str | os.PathLike | None = None,
    mask_base: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Perplexity of a model on a text file, with the model's own tokenizer.

    Args:
        model: a local directory or hub id.
        data: see `read_evaluation_text`.
        seq_length, max_windows: see `cut_windows`.
        mask_file, mask_base: masks to apply to the weights first, and their base if they are a difference: files or hub ids
            (`maskllm.huggingface.mask_file.open_mask_file`).
        dtype: dtype to compute in. The default is the checkpoint's dtype, but fp32 on a CPU without instructions for it: that is
            faster and more exact, with the same weights.
        device: the default is the GPU if there is one.
        trust_remote_code: allow code from the model's directory.

    Raises MaskLLMError if an input cannot be read, the masks do not fit, the device cannot be used, or the windows are longer than
    the model's context.
    """
    if mask_file is None and mask_base is not None:
        raise MaskLLMError("--mask-base: belongs to a mask file that is a difference; give --mask too, or leave it out")
    masks = None if mask_file is None else open_mask_file(mask_file, mask_base)
    directory = find_source(model)
    text = read_evaluation_text(data)
    tokens = load_tokenizer(directory, use_gigatoken=False).encode(text.text)
    windows = cut_windows(tokens, seq_length, max_windows)
    device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    loaded = load_hf_model(directory, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _check_fits(directory, loaded, tokens, seq_length)
    weights = block_weights(loaded)
    if masks is not None:
        masks.apply(weights)
    result = perplexity(hf_window_nll(loaded), windows)
    return Evaluation(
        **dataclasses.asdict(result),
        text_tokens=len(tokens),
        data_kind=text.kind,
        dtype=dtype_name(loaded.dtype),
        device=str(device),
        zeros=zero_share(weights),
    )


def load_hf_model(
    directory: str | os.PathLike, *, dtype: torch.dtype | None = None, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A causal language model in evaluation mode on `device`. `dtype` is as in `evaluate_hf`.

    The files are those that `weight_files` names, or pickled weights without any of them. Raises MaskLLMError if it cannot be
    loaded, or if a tensor is missing.
    """
    directory = Path(directory)
    stored = HFTensors(directory) if weight_files(directory)[0] else None
    if stored is None:
        for file in directory.glob("pytorch_model*"):
            check_not_lfs_pointer(file)
    options = {"dtype": dtype or "auto", "output_loading_info": True}
    try:
        with _quiet_transformers():
            config = load_config(directory, trust_remote_code=trust_remote_code)
            if getattr(config, "attn_logit_softcapping", None) is not None:
                options["attn_implementation"] = "eager"  # transformers before 5.21 takes another one, which has no soft-capping
            model, loading = AutoModelForCausalLM.from_pretrained(
                directory, config=config, local_files_only=True, trust_remote_code=trust_remote_code, **options
            )
            if stored is not None and stored.has_duplicates:  # transformers took those of the last file
                tensors = {name: stored.load(name) for name in stored.names}
                model, loading = type(model).from_pretrained(None, config=model.config, state_dict=tensors, **options)
    except Exception as error:  # missing or damaged files and unknown architectures raise many types
        raise MaskLLMError(f"{directory}: transformers cannot load it: {whole_message(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would initialize these at random
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MaskLLMError(f"{directory}: has no tensor {missing[0]}{more}, which the model in its config.json has")
    if dtype is None and device.type == "cpu" and not computes_natively(model.dtype):
        model = model.float()
    return model.to(device).eval()


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """A block in which transformers reports errors only, and shows progress only on a terminal."""
    verbosity, has_progress = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if has_progress:
            hf_logging.enable_progress_bar()


def usable_device(device: str | torch.device) -> torch.device:
    """`device` as a `torch.device`. Raises MaskLLMError if this machine or this build of torch cannot use it."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise MaskLLMError(
            f"--device {device}: cannot be used here ({whole_message(error)}); wanted cpu, cuda, cuda:1, ..."
        ) from None
    return found


def hf_window_nll(model: PreTrainedModel) -> WindowNLL:
    """The model as a function for `perplexity`."""

    @torch.inference_mode()
    def window_nll(tokens: torch.Tensor) -> float:
        tokens = tokens.to(model.device)
        return next_token_nll(model(tokens[None], use_cache=False).logits[0], tokens)

    return window_nll


def block_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameter name -> stored weight, for every linear of the transformer blocks, without embedding and output layer.

    Raises MaskLLMError if the model's blocks cannot be found.
    """
    prefix, blocks = transformer_blocks(model)
    return {f"{name}.weight": linear.weight.data for name, linear in linears_of(blocks, prefix).items()}


def zero_share(weights: dict[str, torch.Tensor]) -> float:
    """The share of zeros among all elements of `weights`."""
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    return zeros / sum(weight.numel() for weight in weights.values())


def _check_fits(directory: Path, model: PreTrainedModel, tokens: np.ndarray, seq_length: int) -> None:
    check_vocabulary(tokens, model.get_input_embeddings().num_embeddings, f"{directory}'s tokenizer")
    context = getattr(model.config, "max_position_embeddings", None)
    rope = getattr(model.config, "rope_parameters", None) or {}
    if context is not None and rope.get("rope_type") not in ("linear", "dynamic", "yarn"):  # these stretch the context
        check_context(seq_length, context)
