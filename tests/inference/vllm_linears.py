"""Run in an environment with vLLM: its linears with compressed matrices, on each rank of tensor parallelism, against the dense weights.

No server and no process group: the rank and the number of ranks are set by hand. `test_vllm.py` runs it.
"""

import itertools
from types import SimpleNamespace

import torch
from transformers import FalconConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import linear as layers
from vllm.model_executor.models import falcon

from maskllm.errors import MaskLLMError
from maskllm.inference.compressed_format import CompressedMatrix
from maskllm.inference.vllm_layers import MaskLLMVLLMConfig
from maskllm.inference.vllm_plugin import register
from maskllm.ops import Layout, sparse_expand, sparse_pack
from maskllm.patterns import Pattern

HEAD, HEADS, KV_HEADS, HIDDEN, WIDE = 16, 8, 2, 128, 200
KINDS = {
    "2:4": Layout(Pattern(2, 4), 32),
    "2:4 int8": Layout(Pattern(2, 4), 8, 64),
    "2:4 int4": Layout(Pattern(2, 4), 4, -1),
    "1:4 int4": Layout(Pattern(1, 4), 4, 40),
    "2:8": Layout(Pattern(2, 8), 32),
    "any": Layout(None, 32),
    "any int4": Layout(None, 4),
    "dense": None,
}


class Checkpoint:
    """Matrices of random weights by name, as stored and as dense ones."""

    def __init__(self) -> None:
        self.matrices, self.stored, self.dense = {}, {}, {}
        self._generator = torch.Generator().manual_seed(0)

    def add(self, name, rows, columns, layout):
        weight = torch.randn(rows, columns, generator=self._generator)
        if layout is None:
            self.stored[name] = {"weight": weight}
        else:
            n, m = (layout.pattern.n, layout.pattern.m) if layout.pattern else (2, 5)
            order = weight.abs().view(rows, -1, m).argsort(-1, descending=True).argsort(-1)
            weight = torch.where((order < n).view(rows, columns), weight, 0)
            self.stored[name] = sparse_pack(weight, layout)
            self.matrices[name] = CompressedMatrix(rows, columns, layout, torch.float32)
            weight = sparse_expand(self.stored[name], layout, columns, torch.float32)
        self.dense[name] = weight


def on_rank(rank, ranks):
    layers.get_tensor_model_parallel_rank = lambda: rank
    layers.get_tensor_model_parallel_world_size = lambda: ranks


def loaded(make, checkpoint, shards):
    """A linear of vLLM with the checkpoint's tensors: `shards` maps vLLM's shard ids to names."""
    config = MaskLLMVLLMConfig(dict(checkpoint.matrices))
    config.packed_modules_mapping = {"qkv_proj": ["q", "k", "v"], "gate_up": ["gate", "up"]}
    layer = make(config)
    for shard_id, name in reversed(shards.items()):
        for key, tensor in checkpoint.stored[name].items():
            parameter = getattr(layer, key)
            parameter.weight_loader(parameter, tensor, *([] if shard_id is None else [shard_id]))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def close(found, wanted, what):
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error < 1e-5, f"{what}: {error}"


def check_column(kind, ranks):
    for fused, rank in itertools.product((False, True), range(ranks)):
        on_rank(rank, ranks)
        checkpoint = Checkpoint()
        x = torch.randn(70, HIDDEN)  # so many rows that activations are not rounded
        if fused:  # one matrix in the checkpoint, as Phi-3 has it
            checkpoint.add("mlp.gate_up", 2 * WIDE, HIDDEN if kind is None or kind.pattern else 120, kind)
            gate, up = checkpoint.dense["mlp.gate_up"].chunk(2)
            shards = {None: "mlp.gate_up"}
        else:
            for name in ("gate", "up"):
                checkpoint.add(f"mlp.{name}", WIDE, HIDDEN if kind is None or kind.pattern else 120, kind)
            gate, up = checkpoint.dense["mlp.gate"], checkpoint.dense["mlp.up"]
            shards = {0: "mlp.gate", 1: "mlp.up"}
        width = gate.shape[1]
        layer = loaded(
            lambda config, width=width: layers.MergedColumnParallelLinear(
                width, [WIDE, WIDE], bias=False, quant_config=config, prefix="mlp.gate_up", return_bias=False
            ),
            checkpoint,
            shards,
        )
        assert kind is None or len(layer.parts) == 1, "equal layouts make one matrix"
        wanted = torch.cat([part.chunk(ranks)[rank] for part in (gate, up)])
        close(layer(x[:, :width]), x[:, :width] @ wanted.T, f"gate_up {kind} {rank}/{ranks} {fused}")


def check_qkv(kinds, ranks):
    for rank in range(ranks):
        on_rank(rank, ranks)
        checkpoint = Checkpoint()
        for name, heads, kind in zip("qkv", (HEADS, KV_HEADS, KV_HEADS), kinds, strict=True):
            checkpoint.add(f"attn.{name}", heads * HEAD, 120, kind)
        layer = loaded(
            lambda config: layers.QKVParallelLinear(
                120, HEAD, HEADS, KV_HEADS, bias=True, quant_config=config, prefix="attn.qkv_proj", return_bias=False
            ),
            checkpoint,
            {name: f"attn.{name}" for name in "qkv"},
        )
        layer.bias.data.normal_()
        x = torch.randn(70, 120)
        replicas = max(1, ranks // KV_HEADS)  # four ranks share two heads
        parts = [checkpoint.dense["attn.q"].chunk(ranks)[rank]]
        parts += [checkpoint.dense[f"attn.{name}"].chunk(ranks // replicas)[rank // replicas] for name in "kv"]
        close(layer(x), x @ torch.cat(parts).T + layer.bias, f"qkv {kinds} {rank}/{ranks}")


def check_row(kind, ranks):
    total = 0
    checkpoint = Checkpoint()
    checkpoint.add("down", HIDDEN, WIDE, kind)
    x = torch.randn(70, WIDE)
    for rank in range(ranks):
        on_rank(rank, ranks)
        layer = loaded(
            lambda config: layers.RowParallelLinear(
                WIDE, HIDDEN, bias=False, reduce_results=False, quant_config=config, prefix="down", return_bias=False
            ),
            checkpoint,
            {None: "down"},
        )
        total = total + layer(x.chunk(ranks, 1)[rank].contiguous())
    close(total, x @ checkpoint.dense["down"].T, f"down {kind} {ranks}")


class Falcon(torch.nn.Module):
    """The part of vLLM's Falcon that loads the fused query, key and value, which are interleaved in the checkpoint."""

    def __init__(self, quant_config, config):
        super().__init__()
        self.config = config
        self.query_key_value = layers.QKVParallelLinear(
            120,
            HEAD,
            HEADS,
            config.num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix="query_key_value",
            return_bias=False,
        )

    def load(self, tensors):
        falcon.FalconModel.load_weights(self, [(f"query_key_value.{key}", tensor) for key, tensor in tensors.items()])


def check_falcon(kind, kv_heads, ranks):
    config = FalconConfig(new_decoder_architecture=True, num_kv_heads=kv_heads, num_attention_heads=HEADS)
    for rank in range(ranks):
        on_rank(rank, ranks)
        checkpoint = Checkpoint()
        checkpoint.add("query_key_value", (HEADS + 2 * kv_heads) * HEAD, 120, kind)
        layer = Falcon(MaskLLMVLLMConfig(dict(checkpoint.matrices)), config)
        try:
            layer.load(checkpoint.stored["query_key_value"])
        except MaskLLMError as error:
            assert kind.pattern is None and "unstructured" in str(error), error
            continue
        linear = layer.query_key_value
        linear.quant_method.process_weights_after_loading(linear)
        groups = checkpoint.dense["query_key_value"].view(kv_heads, HEADS // kv_heads + 2, HEAD, 120)  # queries, a key, a value
        query, key, value = (part.reshape(-1, 120) for part in (groups[:, :-2], groups[:, -2], groups[:, -1]))
        replicas = max(1, ranks // kv_heads)
        parts = [query.chunk(ranks)[rank], *(part.chunk(ranks // replicas)[rank // replicas] for part in (key, value))]
        x = torch.randn(70, 120)
        close(linear(x), x @ torch.cat(parts).T, f"Falcon {kind} {kv_heads} {rank}/{ranks}")


def check_refusals():
    for name, refused in (("llama4", True), ("llama4_text", True), ("llama", False)):
        try:
            MaskLLMVLLMConfig({}).maybe_update_config("model", hf_config=SimpleNamespace(model_type=name))
        except MaskLLMError as error:
            assert refused and "vLLM reorders the rows of query and key" in str(error), error
        else:
            assert not refused
    on_rank(0, 1)
    checkpoint = Checkpoint()
    checkpoint.add("down", HIDDEN, WIDE, KINDS["2:4"])

    def make(config):
        return layers.RowParallelLinear(WIDE, HIDDEN, bias=False, quant_config=config, prefix="down")

    whole = dict(checkpoint.stored["down"])
    for damage, said in (
        ({"places": whole["places"] | 15}, "down.places: row 0"),
        ({"values": whole["values"][:, 1:]}, "down.values"),
        ({"values": None}, "has not all tensors"),
    ):
        checkpoint.stored["down"] = {key: tensor for key, tensor in (whole | damage).items() if tensor is not None}
        try:
            loaded(make, checkpoint, {None: "down"})
        except MaskLLMError as error:
            assert said in str(error), error
        else:
            raise AssertionError(f"not refused: {said}")


register()
torch.manual_seed(0)
with set_current_vllm_config(VllmConfig()), torch.inference_mode():
    for kind, ranks in itertools.product(KINDS.values(), (1, 2, 4)):
        if kind is not None:
            check_column(kind, ranks)
            check_row(kind, ranks)
            for kv_heads in (2, HEADS):
                check_falcon(kind, kv_heads, ranks)
        check_qkv([kind, kind or KINDS["2:4"], kind], ranks)
        check_qkv([KINDS["2:4"], kind, None], ranks)
    check_refusals()
print("all linears agree")
