"""The whole pipeline through `maskllm quickstart` on a tiny model, and what it leaves behind against independent checks."""

from __future__ import annotations

import contextlib
import json
import os
import pydoc_data.topics
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskllm.cli import main
from maskllm.quickstart.corpus import HELD_OUT_FILE, TRAIN_FILE


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """A random LLaMA with a byte-level tokenizer of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "hf"
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    """Real prose to evaluate on. What is learned from is the quickstart's own corpus, the installation's documentation."""
    path = tmp_path_factory.mktemp("texts") / "held_out.txt"
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    path.write_text("\n\n".join(topics[30:32])[:4000])
    return path


def options(output: Path, model: Path, held_out: Path, *, train_iters: int = 8) -> list[str]:
    """The command line after `maskllm`."""
    words = [
        "quickstart", "--output", output, "--model", model, "--eval-corpus", held_out, "--train-iters", train_iters, "--seq-length", 64,
        "--global-batch-size", 4, "--lr", 0.01, "--prior-strength", 3, "--eval-seq-length", 64, "--eval-windows", 4,
        "--calibration-samples", 4, "--weights-train-iters", 4, "--weights-lr", 0.01, "--prompt", "An object", "--prompt", "<b>&",
    ]  # fmt: skip
    return list(map(str, words))


@pytest.fixture(scope="module")
def python(tmp_path_factory, ranks) -> Path:
    """A stand-in for the interpreter that runs the pipeline's steps without the time that imports take."""
    return ranks.programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, python, tiny_model, held_out) -> Path:
    """The output directory of a finished run."""
    output = tmp_path_factory.mktemp("quickstart") / "out"
    with mock.patch.object(sys, "executable", str(python)):
        assert main(options(output, tiny_model, held_out)) == 0
    return output


@pytest.mark.slow
def test_report_has_every_mask_and_the_curves(quickstart):
    report = json.loads((quickstart / "report.json").read_text())
    by_name = {result["name"]: result for result in report["results"]}
    assert list(by_name) == ["dense", "magnitude", "wanda", "sparsegpt", "learned", "final"]
    for name, result in by_name.items():
        assert result["zeros"] == pytest.approx(0.0 if name == "dense" else 0.5, abs=1e-3)
    train = [line for line in report["metrics"] if line["kind"] == "train"]
    assert train[-1]["iteration"] == 8
    page = (quickstart / "report.html").read_text()
    assert "<svg" in page
    validations = [line for line in report["weights_metrics"] if line["kind"] == "validation"]
    assert [line["iteration"] for line in validations] == [2, 4]
    assert all(line[key] > 0 for line in validations for key in ("loss_sampled", "kl_sampled", "loss_winner", "kl_winner"))
    assert [entry["prompt"] for entry in report["continuations"]] == ["An object", "<b>&"]
    prior = report["settings"]["prior"]
    assert all(list(entry["texts"]) == ["dense", prior, "learned", "final", "compressed"] for entry in report["continuations"])
    assert "&lt;b&gt;&amp;" in page
    compressed, dense = report["speed"]
    assert (compressed["model"], dense["model"]) == ("compressed", "dense")
    assert compressed["weight_bytes"] < dense["weight_bytes"] and compressed["tokens_per_second"] > 0


@pytest.mark.slow
def test_the_corpus_is_thousands_of_documents_of_prose(quickstart):
    train, held_out = (
        [json.loads(line)["text"] for line in (quickstart / "corpus" / name).read_text(encoding="utf-8").splitlines()]
        for name in (TRAIN_FILE, HELD_OUT_FILE)
    )
    texts = train + held_out
    assert len(set(texts)) == len(texts) > 3000
    characters = sum(map(len, texts))
    assert characters > 2_500_000
    assert 0.03 < len(held_out) / len(texts) < 0.07
    assert sum(character.isalpha() or character.isspace() for text in texts for character in text) > 0.93 * characters
    assert not any(">>>" in text or "```" in text for text in texts)


@pytest.mark.slow
def test_exported_weights_keep_exactly_two_of_four_bit_for_bit(quickstart, tiny_model):
    original, learned = load_file(tiny_model / "model.safetensors"), load_file(quickstart / "hf" / "learned" / "model.safetensors")
    assert original.keys() == learned.keys()
    pruned = 0
    for name, weight in original.items():
        found = learned[name]
        assert found.dtype == weight.dtype, name
        if "_proj." not in name:
            assert torch.equal(found, weight), name
            continue
        pruned += 1
        kept = found != 0
        assert torch.equal(found[kept], weight[kept]), name
        full_blocks = (weight != 0).view(-1, 4).all(1)
        assert full_blocks.float().mean() > 0.9
        assert (kept.view(-1, 4).sum(1)[full_blocks] == 2).all(), name
    assert pruned == 2 * 7


@pytest.mark.slow
def test_the_final_models_weights_were_trained_and_are_two_of_four(quickstart, tiny_model):
    original, final = load_file(tiny_model / "model.safetensors"), load_file(quickstart / "hf" / "final" / "model.safetensors")
    for name, weight in original.items():
        found = final[name]
        assert found.dtype == weight.dtype, name
        if "embed" in name:
            assert torch.equal(found, weight), name
        elif "_proj." in name:
            kept = found != 0
            assert (kept.view(-1, 4).sum(1) <= 2).all(), name
            assert (found[kept] != weight[kept]).float().mean() > 0.2, name
    assert "weights_dtype" in (quickstart / "megatron" / "final-trimmed" / "release" / "maskllm.json").read_text()


@pytest.mark.slow
def test_learned_masks_differ_from_the_prior(quickstart):
    line = [json.loads(line) for line in (quickstart / "megatron" / "learned" / "metrics.jsonl").read_text().splitlines()]
    assert line[-2]["changed_since_prior"] > 0.05


@pytest.mark.slow
def test_megatron_and_hugging_face_paths_and_the_mask_file_agree(quickstart, tiny_model, held_out, tmp_path):
    expected = json.loads((quickstart / "evaluation" / "learned.json").read_text())["perplexity"]
    common = ["--data", str(held_out), "--seq-length", "64", "--max-windows", "4"]
    sources = {
        "trained": ["--load", quickstart / "megatron" / "learned"],
        "trimmed": ["--load", quickstart / "megatron" / "learned-trimmed"],
        "masked": ["--model", tiny_model, "--mask", quickstart / "learned.mask.npz"],
    }
    for name, source in sources.items():
        assert main(["evaluate", *map(str, source), *common, "--json", str(tmp_path / f"{name}.json")]) == 0
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["perplexity"] == pytest.approx(expected, rel=1e-3), name
        assert found["zeros"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_mask_file_is_the_published_format(quickstart, tiny_model):
    weights = load_file(quickstart / "hf" / "learned" / "model.safetensors")
    with np.load(quickstart / "learned.mask.npz", allow_pickle=False) as masks:
        assert sorted(masks) == sorted(f"{name}.mask" for name in weights if "_proj." in name)
        for key in masks:
            weight = weights[key.removesuffix(".mask")]
            mask = np.unpackbits(masks[key])[: weight.numel()].reshape(weight.shape).astype(bool)
            assert (weight.float().numpy()[~mask] == 0).all()
            assert mask.mean() == 0.5


@pytest.mark.slow
def test_a_second_run_skips_what_is_done(quickstart, python, tiny_model, held_out, capfd):
    before = (quickstart / "hf" / "learned" / "model.safetensors").stat().st_mtime_ns
    with mock.patch.object(sys, "executable", str(python)):
        assert main(options(quickstart, tiny_model, held_out)) == 0
    printed = capfd.readouterr()
    for step in json.loads((quickstart / "steps.json").read_text()):
        assert f"[{step}] done before" in printed.err
    assert "learned" in printed.out
    assert (quickstart / "hf" / "learned" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_interrupted_by_ctrl_c_goes_on_from_there(quickstart, ranks, python, tiny_model, held_out, tmp_path, capfd):
    """The last test of this file: it trains again, for longer."""
    metrics = quickstart / "megatron" / "learned" / "metrics.jsonl"
    steps = 60
    longer = options(quickstart, tiny_model, held_out, train_iters=steps)
    before = metrics.read_text()

    def trains_again() -> bool:
        text = ""
        with contextlib.suppress(FileNotFoundError):  # the pipeline removes it before it trains for longer
            text = metrics.read_text()
        return text.count("\n") >= 2 and text != before

    program, console = tmp_path / "program.py", tmp_path / "console"
    program.write_text(
        f"import sys\nfrom maskllm.cli import main\nsys.executable = {str(python)!r}\nsys.exit(main(sys.argv[1:]))\n"
    )
    with console.open("w") as file:
        job = ranks.start(None, [str(program), *longer], [file.fileno()] * 2)
    try:
        deadline = time.monotonic() + 300
        while not trains_again():
            assert job.poll() is None, console.read_text()[-3000:]
            assert time.monotonic() < deadline, console.read_text()[-3000:]
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGINT)  # as a terminal does, to all processes in the foreground
        assert job.wait(300) == 130, console.read_text()[-3000:]
    finally:
        job.kill()
    assert "interrupted; run the same command again" in console.read_text()
    saved = int((quickstart / "megatron" / "learned" / "latest_checkpointed_iteration.txt").read_text())
    assert 0 < saved < steps
    assert not (quickstart / "hf" / "learned" / "model.safetensors").stat().st_mtime > metrics.stat().st_mtime

    with mock.patch.object(sys, "executable", str(python)):
        assert main(longer) == 0
    printed = capfd.readouterr().err
    assert "[prune sparsegpt] done before" in printed
    assert f"after iteration {saved} of {steps}" in printed
    trained = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["iteration"] for line in trained if "grad_norm" in line] == list(range(5, steps + 1, 5))
