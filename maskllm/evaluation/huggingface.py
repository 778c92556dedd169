"""Perplexity of a Hugging Face model: dense, sparse, or with a mask file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from maskllm.data.tokenizer import load_tokenizer
from maskllm.dtypes import dtype_name
from maskllm.errors import MaskLLMError
from maskllm.evaluation.perplexity import Perplexity, WindowNLLs, next_token_nll, perplexity
from maskllm.evaluation.windows import read_windows
from maskllm.families.model_config import check_context, check_vocabulary
from maskllm.huggingface.blocks import block_linears
from maskllm.huggingface.hub import find_source
from maskllm.huggingface.loading import context_of, load_hf_model, usable_device
from maskllm.huggingface.mask_file import MaskFile, open_masks
from maskllm.huggingface.tensors import weight_files
from maskllm.huggingface.weights_hash import weights_sha256
from maskllm.inference.sparse_linear import SparseLinear

AUTO_TOKENS = 16384
"""How many tokens the first batch of windows has with the batch size "auto"."""


@dataclass(frozen=True)
class Evaluation(Perplexity):
    """The perplexity of a model on a text, and what was evaluated."""

    text_tokens: int
    """Tokens in the whole text, including those outside of the evaluated windows."""
    data_kind: str
    """How the text was read; see `TextWindows.kind`."""
    dtype: str
    """The dtype that the model computed in."""
    device: str
    zeros: float
    """The share of zeros among the weights of the transformer blocks' linear layers."""
    weights_sha256: str | None = None
    """As `maskllm.evaluation.zero_shot.ModelScores` has it; None for Megatron checkpoints."""
    mask_sha256: str | None = None
    """As `ModelScores` has it."""


def evaluate_hf(
    model: str | os.PathLike,
    data: str | os.PathLike,
    *,
    seq_length: int,
    max_windows: int | None = None,
    data_format: str = "auto",
    batch_size: int | str | None = None,
    mask_file: str | os.PathLike | None = None,
    mask_base: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """Perplexity of a model on a text file, with the model's own tokenizer.

    Args:
        model: a local directory or hub id.
        data, seq_length, max_windows, data_format: see `maskllm.evaluation.windows.read_windows`.
        batch_size: windows in a batch; "auto" begins with AUTO_TOKENS tokens. The default is "auto" on a GPU and 1 on a CPU.
        mask_file, mask_base: masks to apply to the weights first, and their base if they are a difference: files or hub ids
            (`maskllm.huggingface.mask_file.open_mask_file`).
        dtype: dtype to compute in. The default is the checkpoint's dtype, but fp32 on a CPU without instructions for it: that is
            faster and more exact, with the same weights.
        device: the default is the GPU if there is one.
        trust_remote_code: allow code from the model's directory.

    Raises MaskLLMError if an input cannot be read, the masks do not fit, the device cannot be used, or the windows are longer than
    the model's context.
    """
    masks = open_masks(mask_file, mask_base)
    directory = find_source(model)
    tokenizer = load_tokenizer(directory, use_gigatoken=False)
    text = read_windows(data, tokenizer, seq_length, max_windows=max_windows, data_format=data_format)
    device = usable_device(device)
    loaded, zeros = load_sparse_model(directory, masks, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    _check_fits(directory, loaded, text.tokens, seq_length)
    if batch_size == "auto" or (batch_size is None and device.type != "cpu"):
        batch_size = max(1, AUTO_TOKENS // seq_length)
    result = perplexity(hf_window_nlls(loaded), text.windows, batch_size or 1)
    return Evaluation(
        **dataclasses.asdict(result),
        text_tokens=len(text.tokens),
        data_kind=text.kind,
        dtype=dtype_name(loaded.dtype),
        device=str(device),
        zeros=zeros,
        weights_sha256=hash_of(directory),
        mask_sha256=None if masks is None else masks.digest,
    )


def hash_of(directory: Path) -> str | None:
    """The hash of a directory's weights (`maskllm.huggingface.weights_hash`); None without safetensors."""
    return weights_sha256(directory) if weight_files(directory)[0] else None


def load_sparse_model(
    directory: str | os.PathLike,
    masks: MaskFile | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool,
) -> tuple[PreTrainedModel, float]:
    """`load_hf_model` with masks applied, and the share of zeros in the blocks' linear layers.

    Raises MaskLLMError as that does, if the masks do not fit, and if there are masks for compressed weights.
    """
    loaded = load_hf_model(directory, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    compressed = [module for module in loaded.modules() if isinstance(module, SparseLinear)]
    weights = block_weights(loaded)
    if masks is not None:
        if compressed:
            raise MaskLLMError(f"{directory}: its weights are compressed; use masks before that, with maskllm compress --mask")
        masks.apply(weights)
    return loaded, zero_share(weights, compressed)


def hf_window_nlls(model: PreTrainedModel) -> WindowNLLs:
    """The model as a function for `perplexity`."""

    @torch.inference_mode()
    def window_nlls(windows: torch.Tensor) -> list[float]:
        windows = windows.to(model.device)
        logits = model(windows, use_cache=False).logits
        return [next_token_nll(rows, tokens) for rows, tokens in zip(logits, windows, strict=True)]

    return window_nlls


def block_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameter name -> weight, for every linear of the transformer blocks that is dense, without embedding and output layer.

    Raises MaskLLMError if the model's blocks cannot be found.
    """
    return {f"{name}.weight": linear.weight.data for name, linear in block_linears(model).items()}


def zero_share(weights: dict[str, torch.Tensor], compressed: Sequence[SparseLinear] = ()) -> float:
    """The share of zeros among all elements of `weights` and of the weights of `compressed`."""
    zeros = sum(int((weight == 0).sum()) for weight in weights.values()) + sum(linear.zeros for linear in compressed)
    return zeros / sum(weight.numel() for weight in [*weights.values(), *(linear.weight for linear in compressed)])


def _check_fits(directory: Path, model: PreTrainedModel, tokens: np.ndarray, seq_length: int) -> None:
    check_vocabulary(tokens, model.get_input_embeddings().num_embeddings, f"{directory}'s tokenizer")
    if (context := context_of(model.config)) is not None:
        check_context(seq_length, context)
