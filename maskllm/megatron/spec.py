"""The layer spec that puts masked linears into a Megatron GPT model."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from maskllm.families.linears import FC1, FC2, PROJ, QKV
from maskllm.megatron.attention import SDPACoreAttention
from maskllm.megatron.linears import BY_PARTITION_DIM
from maskllm.megatron.norm import LocalNorm
from maskllm.megatron.rotary import SelfAttentionByKind
from maskllm.megatron.transformer_config import FamilyTransformerConfig


def norm_and_attention(config: FamilyTransformerConfig, transformer_impl: str) -> tuple[type, type]:
    """The norm and the core attention of `--transformer-impl`, local or transformer_engine, as upstream's layer specs name them.

    Transformer Engine's attention has no soft-capping. A model with it has this project's attention.
    """
    if transformer_impl == "local":
        return LocalNorm, SDPACoreAttention
    # Not at the top: the import takes seconds if Transformer Engine is installed.
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

    return TENorm, SDPACoreAttention if config.attention_softcap is not None else TEDotProductAttention


def masked_layer_spec(config: FamilyTransformerConfig, transformer_impl: str = "local") -> ModuleSpec:
    """One transformer layer whose four linears can be masked; checkpoint keys are those of Megatron's own GPT layer specs."""
    norm, core_attention = norm_and_attention(config, transformer_impl)
    qk_norm = norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttentionByKind if config.local_rope else SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=BY_PARTITION_DIM[QKV.partition_dim],
                    core_attention=core_attention,
                    linear_proj=BY_PARTITION_DIM[PROJ.partition_dim],
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=BY_PARTITION_DIM[FC1.partition_dim], linear_fc2=BY_PARTITION_DIM[FC2.partition_dim]
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": f"{QKV.name}.layer_norm_",
                "pre_mlp_layernorm.": f"{FC1.name}.layer_norm_",
            },
        ),
    )


def block_spec(config: FamilyTransformerConfig, pp_rank: int, transformer_impl: str = "local") -> TransformerBlockSubmodules:
    """This pipeline rank's layers and the final norm."""
    layers = get_num_layers_to_build(config, pp_rank=pp_rank)
    norm, _ = norm_and_attention(config, transformer_impl)
    return TransformerBlockSubmodules(layer_specs=[masked_layer_spec(config, transformer_impl)] * layers, layer_norm=norm)
