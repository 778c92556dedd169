"""Activation recomputation of masked layers: the second forward pass of a micro-batch draws the masks of the first.

Under the pipeline schedule a micro-batch's activations are recomputed after later micro-batches have gone forward. Megatron's
checkpointing (`megatron.core.tensor_parallel.random.CheckpointFunction`) therefore puts the random states of its tracker back to what
they were; the sample index, which is all the random state that mask draws have, lives there among them.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, is_checkpointing

STATE_NAME = "maskllm-sample"


def set_sample(sample: int) -> None:
    """Say which global sample index the next forward passes draw masks for."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states(tracker.get_states() | {STATE_NAME: sample})


def current_sample() -> int:
    """The global sample index of the micro-batch that is going forward, or whose activations are being recomputed."""
    return get_cuda_rng_tracker().get_states()[STATE_NAME]


def is_recomputing() -> bool:
    """Whether the forward pass under way repeats an earlier one for the backward pass.

    Megatron's checkpointing runs the first pass without gradients and the second with.
    """
    return is_checkpointing() and torch.is_grad_enabled()
