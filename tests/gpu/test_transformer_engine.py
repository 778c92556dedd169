"""`--transformer-impl transformer_engine` computes the same as `local`. Needs Transformer Engine and a GPU."""

from __future__ import annotations

import pytest
import torch

from maskllm.checkpoints.reading import load_model, resolve
from maskllm.distributed import device
from maskllm.environment.optional_parts import transformer_engine
from maskllm.megatron.build import build_model
from maskllm.megatron.linears import masked_linears
from maskllm.megatron.process_groups import parallel_processes

pytestmark = pytest.mark.skipif(
    transformer_engine().problem is not None, reason=f"transformer-engine: {transformer_engine().problem}"
)


def test_both_implementations_have_the_same_loss(tiny_dense):
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    tokens = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(0)).to(device())
    positions = torch.arange(64, device=tokens.device).expand(2, -1)
    losses, keys = {}, {}
    with parallel_processes():
        checkpoint = resolve(tiny_dense)
        for impl in ("local", "transformer_engine"):
            model = build_model(checkpoint.model_config, params_dtype=torch.bfloat16, transformer_impl=impl).eval()
            load_model(checkpoint, model)
            uses = any(isinstance(module, TEDotProductAttention) for module in model.modules())
            assert uses == (impl == "transformer_engine")
            assert len(list(masked_linears(model))) == 4 * checkpoint.model_config.num_layers
            keys[impl] = {name for name, _ in model.named_parameters()}
            with torch.no_grad():
                losses[impl] = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous()).cross_entropy
    assert keys["local"] == keys["transformer_engine"]
    torch.testing.assert_close(losses["transformer_engine"], losses["local"], rtol=2e-2, atol=2e-2)
