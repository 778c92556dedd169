"""The line that a run prints when it starts."""

from __future__ import annotations

import torch

from maskllm.environment.optional_parts import apex, transformer_engine, uses_apex_norms


def startup_line(transformer_impl: str, *, own_adam: bool = False) -> str:
    """The device, the backend, the origin of norms, attention and Adam, and the optional parts that are missing.

    `transformer_impl` is one of TRANSFORMER_IMPLS. `own_adam`: the optimizer is this project's.
    """
    from megatron.core.optimizer import Adam

    from maskllm.ops.extension import has_kernels

    if transformer_impl == "transformer_engine":
        norms = attention = "Transformer Engine's"
    else:
        norms, attention = "Apex's" if uses_apex_norms() else "torch's", "torch's"
    library = Adam.__module__.partition(".")[0]
    adam = "MaskLLM's" if own_adam else {"transformer_engine": "Transformer Engine's", "apex": "Apex's"}.get(library, "torch's")
    missing = [str(part) for part in (transformer_engine(), apex()) if part.problem is not None]
    visible = torch.cuda.is_available()
    where = f"{torch.cuda.get_device_name()} with NCCL" if visible else "CPU with gloo, no GPU visible"
    device = "cuda" if visible else "cpu"
    if not has_kernels(device):
        missing.append(f"{device} kernels: not built; they would bring masks several times faster than the PyTorch reference")
    used = f"norms are {norms}, attention is {attention} (--transformer-impl {transformer_impl}), Adam is {adam}"
    return "; ".join([where, used, *missing])
