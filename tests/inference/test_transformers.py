"""Compressed checkpoints in transformers: the same logits as the dense checkpoint, with its own classes and functions."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    GPT2LMHeadModel,
)
from transformers.pytorch_utils import Conv1D

import maskllm
from maskllm.errors import MaskLLMError
from maskllm.export.compress import CompressSettings, compress, decompress
from maskllm.inference import dense_linear
from maskllm.inference.dense_linear import DenseLinear
from maskllm.inference.sparse_linear import SparseLinear
from maskllm.registration import register
from tests.inference.sparse_models import inputs_of, logits_of, sparse_model, write_sparse

AUTO = {"t5": AutoModelForSeq2SeqLM, "whisper": AutoModelForSpeechSeq2Seq}


def load(path: Path, kind: str = "llama3", **options):
    """The model in a directory, by the class that its kind has."""
    return AUTO.get(kind, AutoModelForCausalLM).from_pretrained(path, **options).eval()


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """All tensors in a Hugging Face directory."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def sparse_linears(model: nn.Module) -> dict[str, SparseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def compressed(
    tmp_path: Path, kind: str, dtype: torch.dtype = torch.float32, settings: CompressSettings | None = None, **pattern
) -> Path:
    """Writes the sparse model of a kind to `tmp_path / "hf"`, and compressed to the directory that it returns."""
    write_sparse(tmp_path / "hf", kind, dtype, **pattern)
    compress(tmp_path / "hf", tmp_path / "small", settings)
    return tmp_path / "small"


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("llama3", {}),
        ("llama3.2", {"n": 1}),
        ("gpt2", {}),
        ("gpt2_untied", {"n": 4, "m": 16}),
        ("biases", {}),
        ("gemma3", {}),
        ("phi3", {}),
        ("t5", {}),
        ("whisper", {"n": 1}),
    ],
)
def test_the_logits_of_the_dense_checkpoint(kind, pattern, tmp_path):
    model = load(compressed(tmp_path, kind, **pattern), kind)
    dense = load(tmp_path / "hf", kind)
    count = sum(isinstance(module, nn.Linear | Conv1D) for module in dense.modules())
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    assert len(sparse_linears(model)) == count - len(left) and left in (["lm_head"], ["proj_out"])
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama3", "gpt2", "t5"])
def test_the_logits_of_the_decompressed_integers(kind, bits, tmp_path):
    small = compressed(tmp_path, kind, torch.float32, CompressSettings(bits, group_size=16))
    decompress(small, tmp_path / "back")
    model, back = load(small, kind), load(tmp_path / "back", kind)
    assert {module.values.dtype for module in sparse_linears(model).values()} == {torch.int8 if bits == 8 else torch.uint8}
    found, wanted = logits_of(model), logits_of(back)
    assert (found - wanted).norm() < 0.03 * wanted.norm()  # the kernels round the activations to 8 bits (docs/kernels.md)


def test_unstructured_zeros(tmp_path):
    model = sparse_model("llama3")
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.up_proj.weight).data.masked_fill_(torch.rand_like(layer.mlp.up_proj.weight) < 0.7, 0)
    model.save_pretrained(tmp_path / "hf")
    compress(tmp_path / "hf", tmp_path / "small")
    loaded = load(tmp_path / "small")
    assert loaded.model.layers[0].mlp.up_proj.row_starts.dtype == torch.int64
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=1e-5, atol=1e-5)


def test_dtypes(tmp_path):
    small = compressed(tmp_path, "llama3", torch.bfloat16, CompressSettings(8, group_size=16))
    same = load(small)
    linear = same.model.layers[0].mlp.up_proj
    assert same.dtype == torch.bfloat16 and linear.scales.dtype == torch.float32 and linear.weight.dtype == torch.bfloat16
    assert load(small, dtype=torch.float16).model.layers[0].mlp.up_proj.scales.dtype == torch.float32
    moved = same.to(torch.float16).model.layers[0].mlp.up_proj
    assert moved.scales.dtype == torch.float32 and moved.weight.dtype == torch.float16


def test_a_wider_dtype_keeps_the_values_small_and_exact(tmp_path):
    small = compressed(tmp_path, "llama3", torch.bfloat16)
    model = load(small, dtype=torch.float32)
    assert {module.values.dtype for module in sparse_linears(model).values()} == {torch.bfloat16}
    assert model.model.norm.weight.dtype == torch.float32
    torch.testing.assert_close(logits_of(model), logits_of(load(tmp_path / "hf", dtype=torch.float32)), rtol=1e-5, atol=1e-5)
    half = load(small, dtype=torch.float16)
    assert {module.values.dtype for module in sparse_linears(half).values()} == {torch.float16}
    dense = load(tmp_path / "hf", dtype=torch.float16)
    torch.testing.assert_close(logits_of(half), logits_of(dense), rtol=0.02, atol=0.02)


def test_t5_keeps_a_matrix_in_fp32(tmp_path):
    model = load(compressed(tmp_path, "t5"), "t5", dtype=torch.float16)
    wo = model.decoder.block[0].layer[2].DenseReluDense.wo
    dense = load(tmp_path / "hf", "t5", dtype=torch.float16)
    assert wo.values.dtype == wo.weight.dtype == dense.decoder.block[0].layer[2].DenseReluDense.wo.weight.dtype
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["llama3.2", "gpt2", "t5", "whisper"])
def test_saved_again_it_is_the_same_directory(kind, tmp_path):
    small = compressed(tmp_path, kind, torch.bfloat16, n=3, m=8)
    model = load(small, kind)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    before, after = tensors_of(small), tensors_of(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (small, tmp_path / "again")]
    for key in ("quantization_config", "transformers_weights"):
        assert configs[0][key] == configs[1][key]
    assert torch.equal(logits_of(load(tmp_path / "again", kind)), logits_of(model))
    decompress(tmp_path / "again", tmp_path / "back")
    dense, back = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back")
    assert dense.keys() == back.keys() and all(torch.equal(dense[name], back[name]) for name in dense)


def test_saved_in_another_dtype(tmp_path):
    model = load(compressed(tmp_path, "llama3", torch.float32), dtype=torch.float16)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.dtype == torch.float16
    assert torch.equal(logits_of(again), logits_of(model))


def test_tensors_without_the_prefix_of_the_model(tmp_path):
    """The files of `openai-community/gpt2` have the names of the base model."""
    sparse_model("gpt2").transformer.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["GPT2Model"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    compress(tmp_path / "hf", tmp_path / "small")
    assert "h.0.attn.c_attn.values" in tensors_of(tmp_path / "small")
    model, dense = load(tmp_path / "small"), load(tmp_path / "hf")
    torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))


def test_the_base_model_alone(tmp_path):
    small = compressed(tmp_path, "llama3")
    base = AutoModel.from_pretrained(small).eval()
    assert len(sparse_linears(base)) == 14
    with torch.no_grad():
        tokens = torch.arange(20)[None]
        wanted = load(tmp_path / "hf").model(tokens).last_hidden_state
        torch.testing.assert_close(base(tokens).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama3", "gpt2", "t5"])
def test_dequantize(kind, tmp_path):
    model = load(compressed(tmp_path, kind), kind).dequantize()
    dense = load(tmp_path / "hf", kind)
    assert not sparse_linears(model)
    assert torch.equal(logits_of(model), logits_of(dense))
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    loss = model(**inputs_of(model)).logits.sum()
    loss.backward()  # as any dense model


def test_a_push_follows_the_save_which_one_process_makes(tmp_path, monkeypatch):
    model = load(compressed(tmp_path, "llama3"))
    pushed = []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, *given, **named: pushed.append((given, named)))
    model.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="me/small", private=True, max_shard_size="1GB")
    assert pushed == [(("me/small",), {"private": True, "max_shard_size": "1GB"})]
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(model))
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "config.json").exists() and len(pushed) == 1


@pytest.mark.parametrize("kind", ["biases", "gpt2"])
def test_the_gradients_of_inputs_and_biases(kind, tmp_path):
    """Those of the dense model; a compressed weight has none."""
    model, dense = load(compressed(tmp_path, kind)), load(tmp_path / "hf")
    model.get_submodule(next(iter(sparse_linears(model)))).bias.requires_grad_(True)
    for each in (model, dense):
        each(**inputs_of(each)).logits.square().sum().backward()
    name = next(iter(sparse_linears(model)))
    for parameter in (f"{name}.bias", next(name for name, _ in model.named_parameters() if "emb" in name or "wte" in name)):
        torch.testing.assert_close(model.get_parameter(parameter).grad, dense.get_parameter(parameter).grad, rtol=1e-4, atol=1e-4)
    assert model.get_submodule(name).values.grad is None


@pytest.mark.parametrize("kind", ["llama3", "biases", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_autocast(kind, tokens, tmp_path):
    model, dense = load(compressed(tmp_path, kind)), load(tmp_path / "hf")
    ids = torch.arange(3, 3 + tokens)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids).logits.float(), dense(ids).logits.float(), rtol=0.05, atol=0.05)


def renamed(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a directory with one file, by name."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.embed_tokens.weight", "has no tensor for model.embed_tokens.weight of LlamaForCausalLM"),
        ("model.norm.weight", "has no tensor for model.norm.weight of"),
        ("lm_head.weight", "has no tensor for lm_head.weight of"),
        ("model.layers.1.mlp.up_proj.places", "has no tensor model.layers.1.mlp.up_proj.places"),
    ],
)
def test_no_weight_is_made_up(name, found, tmp_path):
    small = compressed(tmp_path, "llama3")
    renamed(small, lambda tensors: tensors.update({f"{name}x": tensors.pop(name)}))
    with pytest.raises(MaskLLMError, match=found):
        load(small)


@pytest.mark.parametrize(
    ("kind", "auto"), [("llama3", AutoModelForSequenceClassification), ("whisper", AutoModelForAudioClassification)]
)
def test_a_new_head_may_be_made_up(kind, auto, tmp_path):
    assert sparse_linears(auto.from_pretrained(compressed(tmp_path, kind)))


def test_a_matrix_that_the_config_does_not_name(tmp_path):
    small = compressed(tmp_path, "llama3")
    config = json.loads((small / "config.json").read_text())
    del config["quantization_config"]["layouts"][0]["matrices"]["model.layers.0.self_attn.q_proj"]
    (small / "config.json").write_text(json.dumps(config))
    for read in (load, lambda path: decompress(path, tmp_path / "back")):
        with pytest.raises(MaskLLMError, match=r"has a compressed matrix model.layers.0.self_attn.q_proj, which"):
            read(small)


@pytest.mark.parametrize("few_rows", [5, 6])
def test_the_output_layer_in_bf16(few_rows, tmp_path, monkeypatch):
    monkeypatch.setitem(dense_linear._FEW_ROWS, torch.bfloat16, few_rows)
    model = load(compressed(tmp_path, "llama3", torch.bfloat16))
    assert type(model.lm_head) is DenseLinear
    called = []
    monkeypatch.setattr(dense_linear, "dense_linear", lambda *given: called.append(given) or torch.ops.maskllm.dense_linear(*given))
    data = torch.randn(2, 3, model.lm_head.in_features, dtype=torch.bfloat16)
    wanted = data.double() @ model.lm_head.weight.double().T
    for context in (contextlib.nullcontext, torch.inference_mode):
        with context():
            torch.testing.assert_close(model.lm_head(data).double(), wanted, rtol=2**-8, atol=1e-6)
    assert len(called) == (1 if few_rows == 6 else 0)  # not with a gradient, and not with more rows
    model.lm_head(data).sum().backward()
    assert model.lm_head.weight.grad is not None
    model.lm_head.weight.requires_grad_(False)
    model.lm_head.bias = nn.Parameter(torch.zeros(model.lm_head.out_features, dtype=torch.bfloat16))
    model.lm_head(data).sum().backward()
    assert model.lm_head.bias.grad is not None
    assert type(model.dequantize().lm_head) is nn.Linear


@pytest.mark.parametrize("kind", ["llama3", "t5", "whisper"])
def test_generate_with_a_static_cache(kind, tmp_path):
    model, dense = load(compressed(tmp_path, kind), kind), load(tmp_path / "hf", kind)
    inputs = {name: value[:, :6] if name == "input_ids" else value for name, value in inputs_of(dense).items()}
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = dense.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options), wanted)
    assert torch.equal(model.generate(**inputs, **options, cache_implementation="static"), wanted)


def test_torch_compile(tmp_path):
    model = load(compressed(tmp_path, "llama3"))
    wanted = logits_of(model)
    forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(forward(**inputs_of(model)).logits, wanted, rtol=1e-5, atol=1e-5)


def test_device_maps(tmp_path):
    small = compressed(tmp_path, "llama3")
    wanted = logits_of(load(small))
    for device_map in ("auto", "cpu", {"": "cpu"}):
        assert torch.equal(logits_of(load(small, device_map=device_map)), wanted)
    devices = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    }
    model = load(small, device_map=devices | {"model.rotary_emb": "cpu"}, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.values.is_meta
    assert torch.equal(logits_of(model), wanted)
    narrow = load(
        small, dtype=torch.bfloat16, device_map=devices | {"model.rotary_emb": "cpu"}, offload_folder=tmp_path / "offload-bf16"
    )
    torch.testing.assert_close(logits_of(narrow), logits_of(load(small, dtype=torch.bfloat16)), rtol=2**-7, atol=2**-7)
    file = small / "model.safetensors"
    data = bytearray(file.read_bytes())
    with safe_open(file, framework="pt") as opened:
        header = 8 + int.from_bytes(data[:8], "little")
        start = json.loads(data[8:header])["model.layers.1.mlp.up_proj.places"]["data_offsets"][0]
        assert opened.get_tensor("model.layers.1.mlp.up_proj.places").flatten()[0] == data[header + start]
    data[header + start] = 0
    file.write_bytes(data)
    with pytest.raises(MaskLLMError, match=r"model.layers.1.mlp.up_proj.places: row 0, block 0"):
        load(small, device_map=devices | {"model.rotary_emb": "cpu"}, offload_folder=tmp_path / "offload2")


class _Shapes(TorchDispatchMode):
    """Collects the shapes of floating-point tensors that operators make in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("bits", [None, 8])
def test_loading_makes_no_dense_matrix(bits, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees its own thread only
    small = compressed(tmp_path, "llama3", torch.bfloat16, CompressSettings(bits, group_size=16))
    dense = {tuple(module.matrix.dense_shape) for module in sparse_linears(load(small)).values()}
    with _Shapes() as seen:
        load(small)
    assert not dense & seen.shapes
    with _Shapes() as seen:
        load(tmp_path / "hf", dtype=torch.float32)
    assert dense <= seen.shapes  # the test would see one


def test_a_copy_saves_and_moves_like_the_model(tmp_path):
    model = load(compressed(tmp_path, "llama3"))
    copied = copy.deepcopy(model)
    copied.model.layers[0].mlp.up_proj.values.data.mul_(2)
    copied.save_pretrained(tmp_path / "copy")
    name = "model.layers.0.mlp.up_proj.values"
    assert torch.equal(tensors_of(tmp_path / "copy")[name], 2 * tensors_of(tmp_path / "small")[name])


def test_a_state_dict_and_another_models_matrices_are_refused(tmp_path):
    small = compressed(tmp_path, "llama3")
    model = load(small)
    with pytest.raises(MaskLLMError, match="from its directory or its hub id"):
        type(model).from_pretrained(None, config=AutoConfig.from_pretrained(small), state_dict=model.state_dict())
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(
        MaskLLMError, match=r"has a matrix model.layers.0.mlp.down_proj \[32, 48\]; the model has Linear \[32, 96\]"
    ):
        load(small)


WITHOUT_MASKLLM = """
import sys
sys.modules["maskllm"] = None
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except Exception as error:
        print(error)
"""

MASKLLM_FIRST = """
import sys
import maskllm
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
import transformers.quantizers.auto
assert "maskllm" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
assert "maskllm.ops" not in sys.modules
"""


def run(program: str, *arguments: object, maskllm_path: bool) -> str:
    """Standard output of a Python program, in a process in which maskllm can be imported or not."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if maskllm_path:
        environment["PYTHONPATH"] = str(Path(maskllm.__file__).parents[1])
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True).stdout


def test_without_maskllm_it_says_what_to_install(tmp_path):
    path = compressed(tmp_path, "llama3")
    load(path).save_pretrained(tmp_path / "again")
    first, second = run(WITHOUT_MASKLLM, path, tmp_path / "again", maskllm_path=False).splitlines()
    for line in (first, second):
        assert "pip install maskllm and import maskllm first" in line


def test_importing_maskllm_imports_no_other_library_and_registers_with_transformers_later():
    run(MASKLLM_FIRST, maskllm_path=True)


def test_importing_maskllm_after_transformers():
    before = list(sys.meta_path)
    register()
    assert sys.meta_path == before
    assert "maskllm" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING


def test_a_dense_model_is_not_quantized_while_it_loads(tmp_path):
    small = compressed(tmp_path, "gpt2")
    config = load(small).config.quantization_config
    with pytest.raises(ValueError, match="pre-quantized"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "hf", quantization_config=config)
