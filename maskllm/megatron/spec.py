"""The layer spec that puts masked linears into a Megatron GPT model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from maskllm.megatron.attention import SDPACoreAttention
from maskllm.megatron.linears import MaskedColumnParallelLinear, MaskedRowParallelLinear
from maskllm.megatron.norm import LocalNorm

MaskedLinear = MaskedColumnParallelLinear | MaskedRowParallelLinear


def norm_and_attention(transformer_impl: str) -> tuple[type, type]:
    """The norm and the core attention of one of `maskllm.environment.optional_parts.TRANSFORMER_IMPLS`, as upstream's layer specs name them."""
    if transformer_impl == "local":
        return LocalNorm, SDPACoreAttention
    # Not at the top: the import takes seconds where Transformer Engine is installed.
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

    return TENorm, TEDotProductAttention


def masked_layer_spec(transformer_impl: str = "local") -> ModuleSpec:
    """One transformer layer whose four linears can be masked; checkpoint keys are those of Megatron's own GPT layer specs."""
    norm, core_attention = norm_and_attention(transformer_impl)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=MaskedColumnParallelLinear,
                    core_attention=core_attention,
                    linear_proj=MaskedRowParallelLinear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=MaskedColumnParallelLinear, linear_fc2=MaskedRowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def block_spec(config: TransformerConfig, pp_rank: int, transformer_impl: str = "local") -> TransformerBlockSubmodules:
    """This pipeline rank's layers and the final norm."""
    layers = get_num_layers_to_build(config, pp_rank=pp_rank)
    norm, _ = norm_and_attention(transformer_impl)
    return TransformerBlockSubmodules(layer_specs=[masked_layer_spec(transformer_impl)] * layers, layer_norm=norm)


def masked_linears(model: torch.nn.Module) -> Iterator[MaskedLinear]:
    """The model's masked linears in layer order, named on first use."""
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            for name, child in module.named_modules():
                if isinstance(child, MaskedLinear):
                    child.name = f"decoder.layers.{module.layer_number - 1}.{name}"
                    child.gated = name == "mlp.linear_fc1" and module.config.gated_linear_unit
                    yield child
