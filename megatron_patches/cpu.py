"""Patches that let Megatron Core run on CPU tensors and gloo.

Upstream assumes a CUDA device in a few dozen places: `torch.cuda.current_device()` and the literal "cuda" as the device of new
tensors, type names such as 'torch.cuda.FloatTensor', and the CUDA random-number tracker. Each patch here is one small function
that names the upstream symbol and the text in it that makes the patch necessary. `tests/test_megatron_patches.py` fails if
upstream no longer contains that text; then the patch can be removed.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_patches.patch import Patch, upstream_object

PATCHES: list[Patch] = []


def _patch(upstream: str, needed_for: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        PATCHES.append(Patch(function, upstream, needed_for))
        return function

    return register


class _CpuCuda:
    """Replaces `torch.cuda`: the current device is the CPU, there are no streams, and `synchronize` does nothing."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def current_stream(self, *_: Any, **__: Any) -> None:  # 0.19 and later call it before each reduction of gradients
        pass

    def synchronize(self, *_: Any, **__: Any) -> None:
        pass


class _CpuTorch:
    """Replaces the name `torch` inside an upstream module. It is the same library, but the device "cuda" means the CPU."""

    cuda = _CpuCuda()

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("tensor", "empty", "zeros", "ones", "full"):
            return value

        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = "cpu"
            return value(*args, **kwargs)

        return make


def _redirect(module: str) -> None:
    importlib.import_module(module).torch = _CpuTorch()


def _rewrite(upstream: str, replacements: dict[str, str]) -> None:
    """Replace texts in the source of an upstream function, and compile the function again in its module."""
    module_name, _, symbol = upstream.partition(":")
    owner_name, _, name = symbol.rpartition(".")
    module = importlib.import_module(module_name)
    owner = getattr(module, owner_name) if owner_name else module
    source = textwrap.dedent(inspect.getsource(upstream_object(upstream)))
    namespace: dict[str, Any] = {}
    for old, new in replacements.items():
        source = source.replace(old, new)
    exec(compile(source, f"<{upstream}, patched for the CPU>", "exec"), module.__dict__, namespace)
    setattr(owner, name, namespace[name])


@_patch("megatron.core.models.common.embeddings.rotary_pos_embedding", "torch.cuda.current_device()")
def rotary_frequencies_on_cpu() -> None:
    """`RotaryEmbedding` moves its frequencies to the current CUDA device."""
    _redirect("megatron.core.models.common.embeddings.rotary_pos_embedding")


@_patch("megatron.core.distributed.param_and_grad_buffer", "torch.cuda.current_device()")
def ddp_buffers_on_cpu() -> None:
    """`_ParamAndGradBuffer` allocates the flat gradient buffer on the current CUDA device."""
    _redirect("megatron.core.distributed.param_and_grad_buffer")


@_patch("megatron.core.tensor_parallel.mappings", "torch.cuda.current_device()")
def tensor_parallel_gathers_on_cpu() -> None:
    """The sequence-parallel all-gather and reduce-scatter allocate their outputs on the current CUDA device."""
    _redirect("megatron.core.tensor_parallel.mappings")


@_patch("megatron.core.tensor_parallel.layers", "torch.cuda.current_device()")
def tensor_parallel_gradients_on_cpu() -> None:
    """The linears' backward pass under sequence parallelism allocates the reduced gradient on the current CUDA device."""
    _redirect("megatron.core.tensor_parallel.layers")


@_patch("megatron.core.pipeline_parallel.p2p_communication", "torch.cuda.current_device()")
def pipeline_transfers_on_cpu() -> None:
    """`P2PCommunicator` receives into tensors on the current CUDA device and synchronizes it after each transfer."""
    _redirect("megatron.core.pipeline_parallel.p2p_communication")


@_patch("megatron.core.pipeline_parallel.schedules", 'device="cuda"')
def pipeline_counters_on_cpu() -> None:
    """The schedules count tokens in a tensor on device "cuda"."""
    _redirect("megatron.core.pipeline_parallel.schedules")


@_patch("megatron.core.optimizer.optimizer", "device='cuda'")
def optimizer_scalars_on_cpu() -> None:
    """`MixedPrecisionOptimizer` and `FP32Optimizer` keep their scale in tensors on device "cuda"."""
    _redirect("megatron.core.optimizer.optimizer")


@_patch("megatron.core.utils:local_multi_tensor_l2_norm", 'device="cuda"')
def norm_without_apex_on_cpu() -> None:
    """`local_multi_tensor_l2_norm`, used if neither Transformer Engine nor Apex is there, returns the norm on device "cuda"."""
    _redirect("megatron.core.utils")


@_patch("megatron.core.optimizer.clip_grads:get_grad_norm_fp32", "device='cuda'")
def gradient_norm_on_cpu() -> None:
    """The gradient norm's buffers are on device "cuda"."""
    _redirect("megatron.core.optimizer.clip_grads")


@_patch("megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32", "'torch.cuda.FloatTensor'")
def gradient_clipping_of_cpu_tensors() -> None:
    """`clip_grad_by_total_norm_fp32` asserts that gradients are CUDA tensors."""
    symbol = "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32"
    _rewrite(symbol, {"torch.cuda.FloatTensor": "torch.FloatTensor"})
    importlib.import_module("megatron.core.optimizer.optimizer").clip_grad_by_total_norm_fp32 = upstream_object(symbol)


@_patch(
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups", "'torch.cuda.FloatTensor'"
)
def distributed_optimizer_of_cpu_tensors() -> None:
    """`DistributedOptimizer` recognizes parameters only by their CUDA type names."""
    _rewrite(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
        {"torch.cuda.FloatTensor": "torch.FloatTensor", "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor"},
    )


@_patch("megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__", "'torch.cuda.BFloat16Tensor'")
def mixed_precision_optimizer_of_cpu_tensors() -> None:
    """`Float16OptimizerWithFloat16Params` recognizes parameters only by their CUDA type names."""
    _rewrite(
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
        {
            "torch.cuda.FloatTensor": "torch.FloatTensor",
            "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
            "super()": "super(Float16OptimizerWithFloat16Params, self)",  # outside of the class, super() does not know it
        },
    )


@_patch("megatron.core.optimizer.distrib_optimizer", "torch.cuda.current_device()")
def distributed_optimizer_states_on_cpu() -> None:
    """`DistributedOptimizer` allocates the states that it loads for another Adam than torch's on the current CUDA device."""
    _redirect("megatron.core.optimizer.distrib_optimizer")


@_patch(
    "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
    "weight.data.cuda()",
)
def tied_embeddings_on_cpu() -> None:
    """Under pipeline parallelism, upstream moves tied embeddings to CUDA before their first all-reduce."""
    _rewrite(
        "megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
        {"weight.data.cuda()": "weight.data"},
    )


@_patch("megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork", "_get_cuda_rng_state")
def random_tracker_without_cuda() -> None:
    """Sequence parallelism forks the CUDA random state, which a CPU does not have. Without dropout, nothing here draws from it."""
    tracker = upstream_object("megatron.core.tensor_parallel.random:CudaRNGStatesTracker")

    @contextlib.contextmanager
    def fork(_: object, name: str = "model-parallel-rng") -> Iterator[None]:
        yield

    tracker.fork = fork


@_patch("megatron.core.tensor_parallel.random:_get_all_rng_states", "_get_cuda_rng_state(")
def recomputation_without_cuda() -> None:
    """Activation recomputation saves and restores the CUDA random state, which a CPU does not have."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: None
    random._set_cuda_rng_state = lambda *_, **__: None


@_patch("megatron.core.dist_checkpointing.strategies.filesystem_async", "torch.cuda.synchronize()")
def checkpoint_writer_on_cpu() -> None:
    """The checkpoint writer synchronizes CUDA after copying tensors to the host."""
    _redirect("megatron.core.dist_checkpointing.strategies.filesystem_async")


@_patch("megatron.core.dist_checkpointing.strategies.state_dict_saver", "torch.cuda.current_device()")
def checkpoint_verdict_on_cpu() -> None:
    """After a save, the ranks reduce a tensor on the current CUDA device to agree whether the save succeeded."""
    _redirect("megatron.core.dist_checkpointing.strategies.state_dict_saver")


@_patch("megatron.core.dist_checkpointing.strategies.async_utils", "torch.cuda.current_device()")
def background_saves_on_cpu() -> None:
    """A background save synchronizes CUDA before it forks. The ranks agree that it has ended by a tensor on the CUDA device."""
    _redirect("megatron.core.dist_checkpointing.strategies.async_utils")
