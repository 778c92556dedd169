"""Hugging Face models for use as they are: loading a model, on a device that works, without transformers' chatter."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from maskllm.environment.cpu_speed import computes_natively
from maskllm.errors import MaskLLMError, whole_message
from maskllm.files import check_not_lfs_pointer
from maskllm.huggingface.config import load_config
from maskllm.huggingface.tensors import HFTensors, weight_files


def load_hf_model(
    directory: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    trust_remote_code: bool = False,
    model_class: type = AutoModelForCausalLM,
) -> PreTrainedModel:
    """A model in evaluation mode on `device`, a causal language model unless `model_class` is another of transformers' `AutoModelFor...`.

    The files are those that `weight_files` names, or pickled weights without any of them.

    Args:
        dtype: dtype to compute in. The default is the checkpoint's dtype, but fp32 on a CPU without instructions for it: that is
            faster and more exact, with the same weights.
        trust_remote_code: allow code from the model's directory.

    Raises MaskLLMError if it cannot be loaded, if a tensor is missing, or if a causal language model is wanted but the model sees later
    tokens, as BERT does.
    """
    directory = Path(directory)
    stored = HFTensors(directory) if weight_files(directory)[0] else None
    if stored is None:
        for file in directory.glob("pytorch_model*"):
            check_not_lfs_pointer(file)
    options = {"dtype": dtype or "auto", "output_loading_info": True}
    try:
        with quiet_transformers():
            config = load_config(directory, trust_remote_code=trust_remote_code)
            if getattr(config, "attn_logit_softcapping", None) is not None:
                options["attn_implementation"] = "eager"  # transformers before 5.21 takes another one, which has no soft-capping
            model, loading = model_class.from_pretrained(
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
    if dtype is None and (wanted := compute_dtype(model.dtype, device)) != model.dtype:
        model = model.to(wanted)  # transformers refuses `float()` for compressed weights
    model = model.to(device).eval()
    # transformers takes models such as BERT for causal ones, which they are only with `is_decoder`.
    if model_class is AutoModelForCausalLM and getattr(model.config, "is_decoder", None) is False and _sees_later_tokens(model):
        found = f"is a {model.config.model_type} model, which sees the tokens that it is to predict"
        raise MaskLLMError(f"{directory}: {found}; wanted a causal language model")
    return model


@torch.inference_mode()
def _sees_later_tokens(model: PreTrainedModel) -> bool:
    """Whether the logits at a place depend on a token after it, by two inputs that differ in their last token."""
    tokens = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], device=model.device) % model.config.vocab_size
    first, second = model(tokens, use_cache=False).logits[:, :-1].float()
    return not torch.allclose(first, second, rtol=0, atol=1e-3 * first.abs().max().item())


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in with a checkpoint's `dtype`: fp32 on a CPU without instructions for it."""
    return torch.float32 if device.type == "cpu" and not computes_natively(dtype) else dtype


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
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


def load_hf_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `directory` as transformers loads it. Raises MaskLLMError if it cannot."""
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and tokenizers raise many types, even plain Exception
        raise MaskLLMError(f"{directory}: transformers cannot read its tokenizer: {whole_message(error)}") from error


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """`device` as a `torch.device`, by default the GPU if there is one, else the CPU.

    Raises MaskLLMError if this machine or this build of torch cannot use it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(1, device=found).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise MaskLLMError(
            f"--device {device}: cannot be used here ({whole_message(error)}); wanted cpu, cuda, cuda:1, ..."
        ) from None
    return found


def context_of(config: PreTrainedConfig) -> int | None:
    """The number of tokens that a model's positions reach; None if there is no such limit."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("linear", "dynamic", "yarn"):  # these stretch the context
        return None
    return getattr(config, "max_position_embeddings", None)
