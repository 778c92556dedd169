"""`sparsify` and `finish` without a training: what gets a mask, which one, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    WavLMConfig,
    Zamba2Config,
    Zamba2ForCausalLM,
)
from transformers.models.mamba import modeling_mamba

from maskllm.errors import MaskLLMError
from maskllm.huggingface import finish, sparsify
from maskllm.huggingface.blocks import block_linears, block_stacks
from maskllm.huggingface.mask_file import write_mask_file
from maskllm.huggingface.masked_linear import MaskedLinear
from maskllm.masking.draw import Draw, open_draw
from maskllm.masking.parameter import use_winners
from maskllm.masking.selection import keep_of_all, keep_of_each_block
from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, prune_hf
from tests.finetuning.tiny import samples, tiny_model


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)])


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"attention": nn.Linear(8, 8), "position": nn.Embedding(4, 8), "conv": nn.Conv1d(8, 8, 3)})
        self.inner = nn.ModuleList([_Inner()])


class _Odd(PreTrainedModel):
    """A model with stacks in unusual places."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.towers = nn.ModuleDict(
            {"left": nn.Sequential(nn.ModuleList([_Outer(), _Outer()])), "right": nn.ModuleList([_Outer()])}
        )
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.convolutions = nn.ModuleList([nn.Sequential(nn.Conv1d(8, 8, 3), nn.LayerNorm(8))])
        self.project = nn.Linear(8, 8)
        self.post_init()


def test_stacks_are_found_by_structure():
    model = _Odd()
    assert list(block_stacks(model)) == ["towers.left.0", "towers.right"]
    expected = {
        f"{block}.{linear}"
        for block in ("towers.left.0.0", "towers.left.0.1", "towers.right.0")
        for linear in (
            "parts.attention",
            "inner.0.experts.0.0",
            "inner.0.experts.0.1",
            "inner.0.experts.1.0",
            "inner.0.experts.1.1",
        )
    }
    assert set(block_linears(model)) == expected, "heads, routers, embeddings and convolutions are no part of it"
    assert set(sparsify(model, "2:4")) == expected
    assert isinstance(model.towers["left"][0][1].parts["attention"], MaskedLinear)


def test_a_model_is_as_it_was_but_for_its_zeros():
    model = tiny_model("gpt2")
    before = {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparsify(model, "1:4", masks={name: _keep(weights[name].t(), Pattern(1, 4)).t() for name in _names(model)}, prior_strength=50.0)
    plain, masks = finish(model)
    assert {name: type(module) for name, module in plain.named_modules()} == {name: kind for name, (kind, _) in before.items()}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, weights[name] * masks.pop(name)) if name in masks else torch.equal(tensor, weights[name]), name
    assert not masks


def test_weights_can_be_trained_after_masks_were_learned():
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    sparsify(model, "2:4")
    finish(model)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    for train in ("weights", "both"):
        sparsify(model, "2:4", train=train)
        finish(model)
    model.requires_grad_(False)
    with pytest.raises(MaskLLMError, match="train 'both': all weights that get masks are frozen"):
        sparsify(model, "2:4", train="both")


def _names(model) -> list[str]:
    return [f"{name}.weight" for name in block_linears(model)]


def _keep(weight, pattern):
    return keep_of_each_block(weight.abs(), pattern)


@pytest.mark.parametrize("pattern", ["16:64", None])
@pytest.mark.parametrize("given", ["zeros", "dictionary", "file"])
def test_masks_come_from_zeros_tensors_or_a_file(pattern, given, tmp_path):
    model = tiny_model("llama", hidden_size=64, intermediate_size=64, num_attention_heads=8, num_key_value_heads=8)
    weights = {name: model.get_parameter(name).data for name in _names(model)}
    keep = (lambda weight: keep_of_all(weight.abs(), 0.75)) if pattern is None else (lambda weight: _keep(weight, Pattern(16, 64)))
    expected = {name: keep(weight) for name, weight in weights.items()}
    masks = None
    if given == "zeros":
        for name, weight in weights.items():
            weight.mul_(expected[name])
        first = next(iter(weights))
        if pattern is not None:  # one zero more than the pattern's
            weights[first][0, expected[first][0].nonzero()[0]] = 0
    elif given == "dictionary":
        masks = expected
    else:
        masks = tmp_path / "masks.npz"
        write_mask_file(masks, expected.items())
    found = sparsify(model, pattern, train="weights", masks=masks)
    for name, parameter in found.items():
        mask = parameter.fixed_mask()
        assert torch.equal(parameter.weight != 0, expected[f"{name}.weight"] & (parameter.weight != 0))
        if pattern is not None:
            assert (mask.unflatten(1, (-1, 64)).sum(-1) == 16).all()
        if given != "zeros":
            assert torch.equal(mask, expected[f"{name}.weight"])
    assert set(finish(model)[1]) == set(expected)


@pytest.mark.parametrize("train", ["masks", "weights", "both"])
def test_what_is_trained(train):
    model = tiny_model("llama")
    model.get_input_embeddings().requires_grad_(False)
    masks = {name: _keep(model.get_parameter(name), Pattern(2, 4)) for name in _names(model)}
    sparsify(model, "2:4", train=train, masks=masks)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    logits = {name for name in trained if name.endswith("mask_logits")}
    assert len(logits) == (0 if train == "weights" else 14)
    others = {name for name, _ in model.named_parameters() if "mask_logits" not in name} - {"model.embed_tokens.weight"}
    assert trained - logits == (set() if train == "masks" else others)


def test_named_modules_are_taken_instead():
    model = tiny_model("llama")
    found = sparsify(model, "2:4", modules=["lm_head", "mlp.up_proj"])
    assert list(found) == ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


def test_a_head_that_is_the_embedding_is_refused():
    """A mask would hold in the head's product only, and `finish` would write its zeros into the embedding."""
    model = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(
        MaskLLMError, match=r"modules: lm_head shares its weight with model\.embed_tokens, in which a mask would not hold"
    ):
        sparsify(model, "2:4", modules=["q_proj", "lm_head"])
    assert len(sparsify(model, "2:4")) == 14


def test_blocks_that_share_their_weights_stay_dense():
    """Zamba calls one block's weights at several depths."""
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"], num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, num_mem_blocks=1, mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=2, mamba_headdim=16,
        adapter_rank=4, attention_head_dim=16,
    )  # fmt: skip
    model = Zamba2ForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = prune_hf(model, samples("llama", 1)[0]["input_ids"][None], PruneSettings("wanda")).unpacked(model)
    assert set(sparsify(model, "2:4", train="weights")) == {name.removesuffix(".weight") for name in masks}
    plain, _ = finish(model)
    moved = {name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(masks) and not any("shared_transformer" in name for name in moved)
    assert sum("mamba.in_proj" in name for name in moved) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "train": "all"}, "train 'all': wanted one of masks, weights, both"),
        ({"pattern": "4:32"}, 'pattern 4:32 has 35960 candidate masks per block.*; take train="weights" with masks from pruning'),
        ({"pattern": "16:64", "train": "both"}, 'pattern 16:64: masks can be learned for M up to 32; take train="weights"'),
        ({"pattern": None}, 'train "masks" without a pattern: unstructured masks cannot be learned; take train="weights"'),
        ({"pattern": "2:4", "train": "weights"}, "no weight is zero; prune the model first"),
        ({"pattern": "2:4", "modules": ["q_porj"]}, "modules: LlamaForCausalLM has no module q_porj"),
        ({"pattern": "2:4", "modules": ["input_layernorm"]}, "layers.0.input_layernorm is a LlamaRMSNorm; wanted a linear"),
        ({"pattern": "2:4", "modules": []}, "modules: wanted a list of names"),
        ({"pattern": "2:4", "modules": "q_proj"}, "modules: wanted a list of names"),
        ({"pattern": 0.5, "train": "weights"}, "pattern 0.5: wanted N:M, or None for unstructured masks"),
        ({"pattern": "2:4", "masks": {}}, "masks: no mask for model.layers.0.mlp.down_proj.weight and 13 more"),
        ({"pattern": "1:3", "modules": ["q_proj"]}, "layers.0.self_attn.q_proj: its .* 16 is not a multiple of 3"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    model = tiny_model("llama")
    before = list(model.state_dict())
    with pytest.raises(MaskLLMError, match=message):
        sparsify(model, **options)
    assert list(model.state_dict()) == before, "a refused model has changed"


def test_masks_that_do_not_fit_are_refused():
    model = tiny_model("llama")
    masks = {name: _keep(model.get_parameter(name), Pattern(2, 4)) for name in _names(model)}
    first = "model.layers.0.self_attn.q_proj.weight"
    for changed, message in (
        (masks | {"other.weight": masks[first]}, "a mask for unknown other.weight"),
        (masks | {first: masks[first].float()}, rf"that of {first} is torch\.float32 \[16, 16\]; wanted torch\.bool \[16, 16\]"),
        (masks | {first: masks[first][:8]}, rf"that of {first} is torch\.bool \[8, 16\]"),
        (masks | {first: torch.ones(16, 16, dtype=torch.bool)}, rf"{first}: output 0, block 0 \(inputs 0 to 3\) keeps 4 weights"),
    ):
        with pytest.raises(MaskLLMError, match=message):
            sparsify(model, "2:4", masks=changed)
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    with pytest.raises(
        MaskLLMError, match=r"q_proj\.weight: output 0, block 0 has 2 weights that are not zero; pattern 1:4 wants 1"
    ):
        sparsify(model, "1:4", train="weights")
    with pytest.raises(MaskLLMError, match=r"q_proj: its weight is torch\.bfloat16.*dtype=torch\.float32"):
        sparsify(model.bfloat16(), "2:4", train="weights")
    sparsify(model, "2:4")
    with pytest.raises(MaskLLMError, match="has masks already"):
        sparsify(model, "2:4")
    finish(model)
    with pytest.raises(MaskLLMError, match="has no masks"):
        finish(model)


def test_attention_that_does_not_call_its_linear_is_refused():
    class Model(_Odd):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2)])

    with pytest.raises(MaskLLMError, match=r"towers\.0\.self_attn\.out_proj: torch\.nn\.MultiheadAttention multiplies"):
        sparsify(Model(), "2:4")


_MAMBA = {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
READ = {
    "mamba": MambaConfig(**_MAMBA, time_step_rank=4),
    "mamba2": Mamba2Config(**_MAMBA, num_heads=4, head_dim=8, n_groups=1, chunk_size=8),
    "jamba": JambaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
    ),
    "wavlm": WavLMConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,), conv_kernel=(4,), conv_stride=(4,),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4, mask_time_prob=0.0, layerdrop=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0,
    ),
}  # fmt: skip
"""Models with blocks that multiply by the weights of linears without calling them."""


@pytest.mark.parametrize("name", READ)
def test_a_product_without_a_call_is_masked(name):
    """Against the plain model with the masked weights written into it, and every mask gets a gradient."""
    torch.manual_seed(0)
    model = AutoModel.from_config(READ[name]).train()
    inputs = torch.randn(1, 64) if name == "wavlm" else samples("llama", 1)[0]["input_ids"][None]
    plain = copy.deepcopy(model)
    found = sparsify(model, "2:4")
    for parameter in found.values():
        parameter.sampler.stats = torch.zeros(2)
    with open_draw(Draw(0)):
        drawn = model(inputs)[0]
        drawn.square().sum().backward()
        for linear, parameter in found.items():
            plain.get_parameter(f"{linear}.weight").data = parameter.effective_weight().detach()
    torch.testing.assert_close(drawn, plain(inputs)[0])
    assert all(parameter.logits.grad is not None and parameter.logits.grad.any() for parameter in found.values())

    with torch.no_grad(), use_winners(list(found.values())):
        winners = model.eval()(inputs)[0]
    assert not torch.equal(winners, drawn)
    torch.testing.assert_close(finish(model)[0](inputs)[0], winners)


class _Fused(torch.autograd.Function):
    """As mamba-ssm's kernels do it: products inside of a function with a backward pass of its own."""

    @staticmethod
    def forward(ctx, states, weight):
        return nn.functional.linear(states.transpose(1, 2)[..., : weight.shape[1]], weight)


def test_a_fused_kernel_that_would_hide_a_mask_is_refused(monkeypatch):
    monkeypatch.setattr(modeling_mamba, "mamba_inner_fn", lambda states, *weights, **_: _Fused.apply(states, weights[4]))
    model = AutoModel.from_config(READ["mamba"]).train()
    tokens = samples("llama", 1)[0]["input_ids"][None]
    sparsify(model, "2:4")
    with (
        open_draw(Draw(0)),
        pytest.raises(MaskLLMError, match=r"layers\.0\.mixer\.out_proj: a fused kernel multiplies by its weight"),
    ):
        model(tokens)
    finish(model)
    sparsify(model, "2:4", train="weights", masks={name: _keep(model.get_parameter(name), Pattern(2, 4)) for name in _names(model)})
    with open_draw(Draw(0)):
        model(tokens)


def test_the_winners_of_logits_decide_the_zeros():
    model = tiny_model("llama")
    found = sparsify(model, "2:4")
    for parameter in found.values():
        parameter.logits.data[..., 3] = 9.0  # the candidate 0110
    plain, masks = finish(model)
    assert all(torch.equal(mask[:, :4], torch.tensor([False, True, True, False]).expand(len(mask), 4)) for mask in masks.values())
    sample = samples("llama", 1)[0]["input_ids"][None]
    assert torch.isfinite(plain(sample).logits).all()
