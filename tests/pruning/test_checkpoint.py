"""`maskllm prune` from checkpoint to checkpoint."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maskllm.cli import main
from maskllm.models.checkpoint import resolve
from maskllm.models.convert import convert
from maskllm.models.families import parameter_map
from maskllm.patterns import Pattern, unpack_mask


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small Llama with grouped-query attention: the Hugging Face model and its Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    model.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "megatron")
    return model, folder / "megatron"


def hf_masks(path):
    """The masks of a pruned checkpoint, Hugging Face name -> bool [out, in], after checking that weights and all else are there."""
    checkpoint = resolve(path)
    masks = {}
    for mapping in parameter_map(checkpoint.model_config):
        weight = checkpoint.tensors[mapping.megatron]
        if mapping.linear is not None:
            bits = checkpoint.tensors[f"{mapping.linear}.mask_bits"].load()
            parts = mapping.to_hf(unpack_mask(bits, weight.shape[1]), checkpoint.model_config)
            masks.update(zip(mapping.hf, parts, strict=True))
    return masks


def hf_weights(path):
    checkpoint = resolve(path)
    weights = {}
    for mapping in parameter_map(checkpoint.model_config):
        parts = mapping.to_hf(checkpoint.tensors[mapping.megatron].load(), checkpoint.model_config)
        weights.update(zip(mapping.hf, parts, strict=True))
    return weights


@pytest.mark.parametrize(
    "options, share", [(["--pattern", "2:4"], None), (["--pattern", "4:8"], None), (["--sparsity", "0.75"], 0.75)]
)
def test_magnitude_needs_no_data_and_keeps_the_weights(dense, tmp_path, options, share):
    model, megatron = dense
    assert main(["prune", "--load", str(megatron), "--output", str(tmp_path / "out"), "--method", "magnitude", *options]) == 0
    info = resolve(tmp_path / "out").info
    assert (info.stage, info.method, info.pattern) == ("pruned", "magnitude", "unstructured" if share else options[1])
    masks, weights = hf_masks(tmp_path / "out"), hf_weights(tmp_path / "out")
    assert len(masks) == 3 * 7
    for name, weight in model.named_parameters():
        if name in weights:
            assert torch.equal(weights[name], weight)
        if name in masks and share:
            assert masks[name].float().mean() == 1 - share
            assert weight[masks[name]].abs().min() >= weight[~masks[name]].abs().max()
        elif name in masks:
            pattern = Pattern.parse(options[1])
            blocks, kept = weight.unflatten(1, (-1, pattern.m)).abs(), masks[name].unflatten(1, (-1, pattern.m))
            assert (kept.sum(-1) == pattern.n).all()
            smallest_kept = blocks.masked_fill(~kept, torch.inf).amin(-1)
            assert (smallest_kept >= blocks.masked_fill(kept, 0).amax(-1)).all()


def test_refuses_before_any_work(dense, tmp_path, capsys):
    _, megatron = dense
    output = tmp_path / "out"

    def prune(*options):
        assert main(["prune", "--load", str(megatron), "--output", str(output), "--method", "magnitude", *options]) == 1
        assert not output.exists()
        return capsys.readouterr().err

    assert "decoder.layers.0.self_attention.linear_qkv.weight" in prune("--pattern", "2:5")
    assert "between 0 and 1" in prune("--sparsity", "50")
    assert "wanted N:M" in prune("--pattern", "half")
    assert "name another directory" in prune("--output", str(megatron))
    assert main(["prune", "--load", str(megatron), "--output", str(output), "--method", "magnitude"]) == 0
    again = ["prune", "--load", str(output), "--output", str(tmp_path / "again"), "--method", "magnitude"]
    assert main(again) == 1
    assert "is a pruned checkpoint" in capsys.readouterr().err
