"""`maskllm prune` on checkpoints, against `prune_hf` on the same model in memory."""

import gc
import json

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from maskllm.checkpoints.reading import resolve
from maskllm.patterns import Pattern, unpack_mask
from maskllm.pruning import PruneSettings, prune_hf
from maskllm.pruning.calibration import open_documents, sample_windows
from maskllm.pruning.statistics import InputStatistics
from maskllm.pruning.store import DirectoryStore
from tests.pruning.pruned import assert_same, calibrated, hf_masks, hf_weights, prune


@pytest.mark.parametrize(
    "options, share", [(["--pattern", "2:4"], None), (["--pattern", "4:8"], None), (["--sparsity", "0.75"], 0.75)]
)
def test_magnitude_needs_no_data_and_keeps_the_weights(tiny_hf, tiny_dense, tmp_path, options, share):
    model = LlamaForCausalLM.from_pretrained(tiny_hf)
    report = tmp_path / "report.json"
    assert prune(tiny_dense, tmp_path / "out", "--method", "magnitude", *options, "--json", report) == 0
    assert json.loads(report.read_text())["method"] == "magnitude"
    info = resolve(tmp_path / "out").info
    assert (info.stage, info.method, info.pattern) == ("pruned", "magnitude", "unstructured" if share else options[1])
    masks, weights = hf_masks(tmp_path / "out"), hf_weights(tmp_path / "out")
    assert len(masks) == 4 * 7
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


def in_memory(hf, dataset, settings):
    """The results of `prune_hf`: the pruned model, the masks (Hugging Face name -> bool [out, in]) and the report."""
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32)
    tokens = sample_windows(open_documents(dataset, hf), 6, 48, seed=3)
    result = prune_hf(model, tokens, settings)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return model, {name: unpack_mask(bits, shapes[name][1]) for name, bits in result.masks.items()}, result.report


@pytest.mark.parametrize(
    "method, options, settings",
    [
        ("wanda", [], PruneSettings("wanda", Pattern(2, 4))),
        ("wanda", ["--pattern", "16:32"], PruneSettings("wanda", Pattern(16, 32))),
        ("sparsegpt", ["--no-sequential"], PruneSettings("sparsegpt", Pattern(2, 4), sequential=False)),
        ("sparsegpt", ["--sparsity", "0.5"], PruneSettings("sparsegpt", 0.5)),
    ],
)
def test_the_masks_are_those_of_the_model_in_memory(tiny_hf, tiny_dense, tiny_dataset, tmp_path, method, options, settings):
    assert prune(tiny_dense, tmp_path / "out", *calibrated(tiny_dataset, method, *options, "--json", tmp_path / "report.json")) == 0
    _, expected, expected_report = in_memory(tiny_hf, tiny_dataset, settings)
    masks, weights, dense = hf_masks(tmp_path / "out"), hf_weights(tmp_path / "out"), hf_weights(tiny_dense)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert all(torch.equal(weights[name], dense[name]) for name in dense)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == method and len(report["layers"]) == 4
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 0
    for layer, expected_layer in zip(report["layers"], expected_report["layers"], strict=True):
        for name, matrix in layer["matrices"].items():
            assert matrix["relative_error"] == pytest.approx(expected_layer["matrices"][name]["relative_error"], rel=1e-4)
    assert list(tmp_path.glob(".*")) == []  # no intermediate files are left


@pytest.fixture(scope="module")
def updated(tiny_dense, tiny_dataset, tmp_path_factory):
    """`tiny_dense`, pruned by SparseGPT with updated weights."""
    path = tmp_path_factory.mktemp("updated") / "out"
    assert prune(tiny_dense, path, *calibrated(tiny_dataset, "sparsegpt", "--update-weights")) == 0
    return path


def test_updated_weights_are_stored_in_the_checkpoints_dtype(updated, tiny_hf, tiny_dense, tiny_dataset):
    masks, weights, dense = hf_masks(updated), hf_weights(updated), hf_weights(tiny_dense)
    model, _, _ = in_memory(tiny_hf, tiny_dataset, PruneSettings("sparsegpt", Pattern(2, 4), update_weights=True))
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16
        if name in masks:
            assert (weight[~masks[name]] == 0).all()
            assert (weight[masks[name]] != dense[name][masks[name]]).float().mean() > 0.5
        else:
            assert torch.equal(weight, dense[name])
    # Only the first layer has the same inputs: here the later ones see weights that were rounded to bf16.
    first = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights[first], model.get_parameter(first).bfloat16())
    assert resolve(updated).info.details["update_weights"] is True


@pytest.fixture
def live_bytes():
    """A function that returns the bytes of all tensors created since the test began that are still alive, each storage once."""

    def count() -> int:
        storages = {}
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type != "meta":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    gc.collect()
    gc.freeze()  # the collector then lists new objects only
    yield count
    gc.unfreeze()


def test_memory_holds_one_layer(tiny_dense, tiny_dataset, tmp_path, monkeypatch, live_bytes):
    """While statistics are collected: a layer's weights, in fp32 and as stored, its Gram matrices, its inputs for one sample, and all
    hidden states."""
    hidden, ffn, qkv, tokens, samples = 64, 128, 128, 48, 6
    seen = []
    add = InputStatistics.add

    def measured(self, inputs):
        add(self, inputs)
        if self.samples == samples:
            seen.append(live_bytes())

    monkeypatch.setattr(InputStatistics, "add", measured)
    assert prune(tiny_dense, tmp_path / "out", *calibrated(tiny_dataset, "sparsegpt")) == 0
    weights = 4 * (qkv * hidden + hidden * hidden + 3 * ffn * hidden + 2 * hidden)
    stored = 2 * (qkv * hidden + hidden * hidden + 3 * ffn * hidden)
    grams = 8 * (3 * hidden**2 + ffn**2)
    one_sample = 4 * tokens * (3 * hidden + ffn + 2 * hidden)  # the inputs of the linears, the layer's input and output
    between_layers = 4 * samples * tokens * hidden + 8 * samples * tokens  # and the tokens themselves
    rotary = 2 * 4 * tokens * 16
    expected = weights + stored + grams + one_sample + between_layers + rotary
    assert 0.8 * expected <= max(seen) <= expected + 4096
    assert len(seen) == 4 * 4
    per_layer = [max(seen[i : i + len(seen) // 4]) for i in range(0, len(seen), len(seen) // 4)]
    assert max(per_layer[1:]) - min(per_layer[1:]) < 4096, "memory accumulates from layer to layer"


def test_an_interrupted_run_continues_after_its_last_layer(updated, tiny_dense, tiny_dataset, tmp_path, monkeypatch):
    arguments = calibrated(tiny_dataset, "sparsegpt", "--update-weights", "--json", tmp_path / "report.json")
    save = DirectoryStore.save

    def stop_at_layer_2(self, index, pruned):
        if index == 2:
            raise KeyboardInterrupt
        save(self, index, pruned)

    monkeypatch.setattr(DirectoryStore, "save", stop_at_layer_2)
    assert prune(tiny_dense, tmp_path / "out", *arguments) == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(DirectoryStore, "save", save)
    assert prune(tiny_dense, tmp_path / "out", *arguments) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [layer["resumed"] for layer in report["layers"]] == [True, True, False, False]
    assert_same(updated, tmp_path / "out")


def test_a_killed_run_continues_after_its_last_layer(updated, tiny_dense, tiny_dataset, tmp_path, ranks):
    """SIGKILL arrives when the second layer's file is complete, but still has its temporary name."""
    report = tmp_path / "report.json"
    arguments = calibrated(tiny_dataset, "sparsegpt", "--update-weights", "--json", report)
    command = ["prune", "--load", tiny_dense, "--output", tmp_path / "out", *arguments]
    assert ranks(1, "tests.pruning.killed_worker", *command, check=False).returncode != 0
    layers = tmp_path / ".out.layers"
    assert [path.name for path in layers.glob("layer_*")] == ["layer_00000.safetensors"]
    assert len(list(layers.iterdir())) == 3, "the temporary file, run.json and the first layer"
    assert not (tmp_path / "out").exists()
    assert prune(tiny_dense, tmp_path / "out", *arguments) == 0
    assert [layer["resumed"] for layer in json.loads(report.read_text())["layers"]] == [True, False, False, False]
    assert_same(updated, tmp_path / "out")
    assert not layers.exists()


def test_a_run_that_failed_while_writing_only_writes_when_repeated(tiny_dense, tiny_dataset, tmp_path, monkeypatch):
    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device", "out")

    arguments = calibrated(tiny_dataset, "wanda")
    monkeypatch.setattr("maskllm.pruning.megatron.write_pruned", no_room)
    assert prune(tiny_dense, tmp_path / "out", *arguments) == 1
    monkeypatch.undo()
    monkeypatch.setattr("maskllm.pruning.layerwise.calibrate", None)
    monkeypatch.setattr("maskllm.pruning.layerwise.advance", None)
    assert prune(tiny_dense, tmp_path / "out", *arguments) == 0
    assert len(hf_masks(tmp_path / "out")) == 28


def test_the_working_directory_can_be_the_output(tiny_dense, tiny_dataset, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert prune(tiny_dense, ".", *calibrated(tiny_dataset, "wanda")) == 0
    assert len(hf_masks(tmp_path / "here")) == 28
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_layers_of_another_run_are_not_reused(tiny_dense, tiny_dataset, tmp_path, monkeypatch):
    def stop(self, index, pruned):
        raise KeyboardInterrupt

    save = DirectoryStore.save
    monkeypatch.setattr(DirectoryStore, "save", lambda self, index, pruned: (stop if index else save)(self, index, pruned))
    assert prune(tiny_dense, tmp_path / "out", *calibrated(tiny_dataset, "wanda")) == 130
    monkeypatch.setattr(DirectoryStore, "save", save)
    report = tmp_path / "report.json"
    assert prune(tiny_dense, tmp_path / "out", *calibrated(tiny_dataset, "wanda", "--no-sequential", "--json", report)) == 0
    assert not any(layer["resumed"] for layer in json.loads(report.read_text())["layers"])


def test_calibrates_on_json_lines_with_the_models_tokenizer(tiny_hf, tmp_path, capsys):
    """A checkpoint without a tokenizer is an error. With one, its tokens count. Short documents need --pack."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from maskllm.checkpoints.convert import convert

    (tmp_path / "data.json").write_text("".join(json.dumps({"text": f"{i} " * 60}) + "\n" for i in range(9)))
    options = [
        "--method",
        "wanda",
        "--calibration-data",
        tmp_path / "data.json",
        "--calibration-samples",
        "3",
        "--seq-length",
        "32",
    ]
    hf = tmp_path / "hf"
    LlamaForCausalLM.from_pretrained(tiny_hf).save_pretrained(hf)
    convert(str(hf), str(tmp_path / "without"))
    assert prune(tmp_path / "without", tmp_path / "out", *options) == 1
    assert "tokenizer.json" in capsys.readouterr().err
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(hf)
    convert(str(hf), str(tmp_path / "with"))
    assert prune(tmp_path / "with", tmp_path / "out", *options) == 0
    assert len(hf_masks(tmp_path / "out")) == 28
    options[-1] = "125"  # each byte is a token, and documents have 120
    capsys.readouterr()
    assert prune(tmp_path / "with", tmp_path / "packed", *options) == 1
    assert "none of the 9 calibration documents is longer than 125 tokens" in capsys.readouterr().err
    assert prune(tmp_path / "with", tmp_path / "packed", *options, "--pack") == 0
    assert resolve(tmp_path / "packed").info.details["calibration"]["pack"] is True


def test_invalid_options_are_refused_before_any_work(tiny_dense, tiny_dataset, tmp_path, capsys):
    def refused(*options):
        assert prune(tiny_dense, tmp_path / "out", *options) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    magnitude = ("--method", "magnitude")
    assert "decoder.layers.0.self_attention.linear_qkv.weight" in refused(*magnitude, "--pattern", "2:5")
    assert "between 0 and 1" in refused(*magnitude, "--sparsity", "50")
    assert "wanted N:M" in refused(*magnitude, "--pattern", "half")
    assert "name another directory" in refused(*magnitude, "--output", str(tiny_dense))
    assert "--seed -1: wanted a number of at least 0" in refused(*calibrated(tiny_dataset, "wanda", "--seed", "-1"))
    assert "needs --calibration-data" in refused("--method", "sparsegpt")
    assert "needs sparsegpt" in refused(*magnitude, "--update-weights")
    assert "wanted a positive number" in refused(*calibrated(tiny_dataset, "wanda", "--seq-length", "0"))
    assert "context of 128 tokens" in refused(*calibrated(tiny_dataset, "wanda", "--seq-length", "129"))


def test_a_checkpoint_with_masks_and_tokens_outside_the_vocabulary_are_refused(tiny_dense, tiny_pruned, tmp_path, capsys):
    assert prune(tiny_pruned, tmp_path / "out", "--method", "magnitude") == 1
    assert "is a pruned checkpoint" in capsys.readouterr().err
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "data.bin"), dtype=np.int32)
    builder.add_document(torch.full((100,), 256), [100])
    builder.finalize(str(tmp_path / "data.idx"))
    assert prune(tiny_dense, tmp_path / "out", *calibrated(tmp_path / "data", "wanda")) == 1
    assert "found token 256, wanted less than the model's vocabulary of 256" in capsys.readouterr().err
