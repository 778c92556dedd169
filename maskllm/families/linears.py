"""The inventory of a transformer layer's linears: which there are, their shapes, and how tensor-parallel ranks split them.

All of them carry a mask (MaskLLM, section 4). The parameter maps of the families, the Megatron layers and the memory plan refer to
this table. The parameter maps (`maskllm/families/llama.py` and so on) add the Hugging Face names.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskllm.families.model_config import ModelConfig
from maskllm.masking.parameter import Location

LAYERS = "decoder.layers."
"""The start of the names of all tensors in Megatron's transformer layers. The layer's index follows."""


@dataclass(frozen=True)
class Linear:
    """One linear of every transformer layer. Its weight is [rows, columns], that is [out, in]."""

    name: str
    """Megatron's name of the linear in the layer."""
    rows: str
    """The number of outputs, as a name in `ModelConfig.dimensions`."""
    columns: str
    """The number of inputs, as a name in `ModelConfig.dimensions`."""
    bias_field: str
    """The field of `ModelConfig` that says whether it has a bias."""
    partition_dim: int
    """The dimension of the weight that tensor-parallel ranks split: 0 for column-parallel linears, 1 for row-parallel linears.
    (Megatron's terms refer to the columns and rows of W^T in x W^T.)"""
    may_be_gated: bool = False
    """Whether it holds the gate and up projections if the MLP has a gate."""

    @property
    def weight(self) -> str:
        """The key of the weight in a Megatron checkpoint, with * for the layer's index."""
        return f"{LAYERS}*.{self.name}.weight"

    @property
    def bias(self) -> str:
        """The key of the bias in a Megatron checkpoint, with * for the layer's index."""
        return f"{LAYERS}*.{self.name}.bias"

    @property
    def dimensions(self) -> tuple[str, str]:
        """The shape of the weight, in names of `ModelConfig.dimensions`."""
        return self.rows, self.columns

    def shape(self, config: ModelConfig, tensor_parallel: int = 1) -> tuple[int, int]:
        """The shape of the weight on each of `tensor_parallel` ranks."""
        sizes = config.dimensions()
        whole = [sizes[self.rows], sizes[self.columns]]
        whole[self.partition_dim] //= tensor_parallel
        return whole[0], whole[1]

    def is_gated(self, config: ModelConfig) -> bool:
        """Whether its rows are gate rows and then as many up rows (fc1 of a gated MLP). Each rank holds a part of both."""
        return self.may_be_gated and config.gated_mlp

    def has_bias(self, config: ModelConfig) -> bool:
        """Whether it has a bias."""
        return getattr(config, self.bias_field)

    def location(self, config: ModelConfig, layer: int, rank: int, tensor_parallel: int) -> Location:
        """Which part of the whole weight tensor-parallel rank `rank` holds.

        For rank 3 of 4 and a gated fc1 with 4096 gate rows: gate rows 3072 to 4095, then up rows 3072 to 4095, which are rows 7168
        to 8191 of the fused weight.
        """
        name = f"{LAYERS}{layer}.{self.name}"
        columns = self.shape(config)[1]
        rows_here, columns_here = self.shape(config, tensor_parallel)
        if self.partition_dim == 1:
            return Location(name, columns, column_offset=rank * columns_here)
        if self.is_gated(config):
            half, all_gate_rows = rows_here // 2, self.shape(config)[0] // 2
            return Location(name, columns, row_offset=rank * half, split_row=half, split_offset=all_gate_rows + rank * half)
        return Location(name, columns, row_offset=rank * rows_here)


QKV = Linear("self_attention.linear_qkv", "qkv", "hidden", "qkv_bias", 0)
"""The fused query, key and value projections. Rows are ordered by query group."""
PROJ = Linear("self_attention.linear_proj", "hidden", "heads", "proj_bias", 1)
"""The attention's output projection."""
FC1 = Linear("mlp.linear_fc1", "fc1", "hidden", "mlp_bias", 0, may_be_gated=True)
"""The MLP's first linear; in a gated MLP the fused gate and up projections."""
FC2 = Linear("mlp.linear_fc2", "hidden", "ffn", "mlp_bias", 1)
"""The MLP's second linear."""

LINEARS = (QKV, PROJ, FC1, FC2)
"""In the order of the forward pass."""


def linear_of(key: str) -> Linear | None:
    """The linear with the weight or bias `key` in a Megatron checkpoint, such as decoder.layers.3.mlp.linear_fc1.weight, or None.

    The tensors of a layer norm do not belong to the linear after it, though their keys start with the name of that linear.
    """
    owner, _, tensor = key.rpartition(".")
    if not owner.startswith(LAYERS) or tensor not in ("weight", "bias"):
        return None
    return next((linear for linear in LINEARS if owner.endswith(f".{linear.name}")), None)


MLP_LINEARS = (FC1, FC2)
