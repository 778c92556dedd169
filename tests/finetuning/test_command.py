"""`maskllm finetune` from data to report, with tiny models."""

from __future__ import annotations

import errno
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import sacrebleu
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from maskllm.cli import main
from maskllm.evaluation.huggingface import evaluate_hf
from maskllm.huggingface.mask_file import open_mask_file
from maskllm.huggingface.weights_hash import weights_sha256
from maskllm.output_lock import LOCK, output_lock
from tests.finetuning import command_models as tiny

LENGTH = 16
FAST = ("--max-length", LENGTH, "--gradient-accumulation-steps", 1, "--per-device-train-batch-size", 4, "--method", "magnitude")

KL = ("--warmup-steps", 0, "--kl-loss-coeff", 1, "--squarehead-loss-coeff", 0)


def command(task: str, model: Path, data: list[Path], output: Path, *options: object) -> list[str]:
    return [
        str(word) for word in ["finetune", "--task", task, "--model", model, "--data", *data, "--output", output, *FAST, *options]
    ]


def run(*arguments: object) -> dict:
    words = command(*arguments)
    assert main(words) == 0
    return json.loads((Path(words[words.index("--output") + 1]) / "report.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    return tiny.llama(folder / "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def documents(folder: Path) -> Path:
    return tiny.documents(folder / "documents.jsonl")


@pytest.fixture(scope="module")
def held_out(folder: Path) -> Path:
    return tiny.documents(folder / "held-out.jsonl", 20)


@pytest.fixture(scope="module")
def text_run(folder: Path, llama: Path, documents: Path, held_out: Path) -> tuple[dict, Path]:
    output = folder / "text"
    options = ("--eval-data", held_out, "--pattern", "2:4", "--max-steps", 6, "--learning-rate", 1e-3, *KL)
    return run("text", llama, [documents], output, *options), output


def weights(directory: Path, model_class: type = AutoModelForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in model_class.from_pretrained(directory).state_dict().items()}


def masked(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of the blocks' linears."""
    return {name: tensor for name, tensor in weights(directory).items() if "layers." in name and tensor.dim() == 2}


def test_the_measures_of_text_are_those_of_evaluate(text_run, llama, held_out):
    report, output = text_run
    for name, directory in (("dense", llama), ("trained", output / "model")):
        wanted = evaluate_hf(directory, held_out, seq_length=LENGTH, dtype=torch.float32, device="cpu").perplexity
        assert math.isclose(report[name]["perplexity"], wanted, rel_tol=1e-5)
    assert report["trained"]["perplexity"] < report["one_shot"]["perplexity"]
    assert [result["name"] for result in report["results"]] == ["dense", "one-shot", "trained"]
    assert [result["zeros"] for result in report["results"]] == [0, 0.5, 0.5]


def test_model_and_mask_file_agree(text_run, llama):
    _, output = text_run
    masks = open_mask_file(output / "mask.npz")
    dense = weights(llama)
    for name, weight in masked(output / "model").items():
        mask = masks.mask(name, tuple(weight.shape))
        assert torch.equal(weight != 0, mask)
        assert (mask.view(-1, 4).sum(1) == 2).all()
        assert not torch.equal(weight[mask], dense[name][mask])
    assert AutoModelForCausalLM.from_pretrained(output / "model").dtype == torch.bfloat16  # as the original
    assert (
        AutoTokenizer.from_pretrained(output / "model")("one two").input_ids
        == AutoTokenizer.from_pretrained(llama)("one two").input_ids
    )
    assert AutoModelForCausalLM.from_pretrained(output / "model").config.use_cache
    assert not (output / "checkpoints").exists()


def test_verify_finds_the_trained_model_as_it_is_said_to_be(text_run, llama, tmp_path, capsys):
    report, output = text_run
    assert report["weights_sha256"] == weights_sha256(output / "model")
    options = ["--mask", output / "mask.npz", "--dense", llama, "--pattern", "2:4"]
    assert main(["verify", *map(str, ["--model", output / "model", *options])]) == 0
    out = capsys.readouterr().out
    assert f"sha256 {report['weights_sha256']}, as weights_sha256.json states" in out
    assert "weights_sha256.json says that they were trained" in out
    assert main(["compress", "--model", str(output / "model"), "--output", str(tmp_path / "compressed")]) == 0
    assert main(["verify", *map(str, ["--model", tmp_path / "compressed", *options])]) == 0
    assert f"sha256 {weights_sha256(tmp_path / 'compressed')}, as weights_sha256.json states" in capsys.readouterr().out


def test_the_page_shows_the_report(text_run):
    report, output = text_run
    page = (output / "report.html").read_text()
    assert "one-shot" in page and "Divergence from the teacher" in page and "Learning rate" in page
    assert report["measure"] == "perplexity" and report["seconds"] > 0 and report["command"].startswith("maskllm")
    assert {"transformers", "torch", "accelerate"} <= report["machine"].keys()


def test_a_finished_run_only_reports_again(text_run, llama, documents, held_out, capsys):
    _, output = text_run
    before = {path: path.stat().st_mtime_ns for path in [*(output / "model").iterdir(), *(output / "evaluation").iterdir()]}
    words = ("--eval-data", held_out, "--pattern", "2:4", "--max-steps", 6, "--learning-rate", 1e-3, *KL)
    run("text", llama, [documents], output, *words)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    shown = capsys.readouterr()
    assert "one-shot" in shown.out
    assert shown.out.endswith(f"wrote {output / 'model'}, {output / 'mask.npz'}, {output / 'report.html'}\n")
    stages = ["measure dense", "prune 2:4", "measure one-shot", "train 2:4", "measure trained"]
    assert [line for line in shown.err.splitlines() if line.startswith("[")] == [f"[{stage}] done before" for stage in stages]
    assert main(command("text", llama, [documents], output, *words, "--learning-rate", 2e-3)) == 1
    assert f"{output}: holds a run with --learning-rate 0.001, not 0.002; " in capsys.readouterr().err


def test_two_runs_in_one_directory_are_refused(text_run, llama, documents, held_out, capsys, tmp_path):
    _, output = text_run
    words = ("--eval-data", held_out, "--pattern", "2:4", "--max-steps", 6, "--learning-rate", 1e-3, *KL)
    with output_lock(output, "--output"):
        assert main(command("text", llama, [documents], output, *words)) == 1
    assert re.search(
        rf"--output {output}: process \d+ on .* is writing there; wait for it, stop it, or name another --output",
        capsys.readouterr().err,
    )
    (tmp_path / LOCK).touch()  # as a kill before anything else is written would leave it
    run("text", llama, [documents], tmp_path, "--sparsity", 0, "--max-steps", 1)


def test_a_completion_counts_and_its_prompt_does_not(folder, llama):
    lines = [{"prompt": "one two", "completion": " three four five"}, {"prompt": "six", "completion": " seven"}]
    data = tiny.json_lines(folder / "pairs.jsonl", lines)
    report = run("text", llama, [data], folder / "completions", "--eval-data", data, "--sparsity", 0, "--max-steps", 1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), AutoTokenizer.from_pretrained(llama)
    total, count = 0.0, 0
    for line in lines:
        prompt = tokenizer(line["prompt"]).input_ids
        whole = torch.tensor([[*tokenizer(line["prompt"] + line["completion"]).input_ids, tokenizer.eos_token_id]])
        labels = whole.clone()
        labels[:, : len(prompt)] = -100
        counted = whole.shape[1] - len(prompt)
        total += counted * model(whole, labels=labels).loss.item()
        count += counted
    assert math.isclose(report["dense"]["perplexity"], math.exp(total / count), rel_tol=1e-5)


def test_the_dense_model_is_trained_with_sparsity_0(folder, llama, documents):
    report = run("text", llama, [documents], folder / "dense", "--sparsity", 0, "--max-steps", 2, "--learning-rate", 1e-3)
    assert "one_shot" not in report and report["results"][-1]["zeros"] == 0
    assert report["trained"]["perplexity"] < report["dense"]["perplexity"]
    assert not (folder / "dense" / "mask.npz").exists()


def test_a_schedule_keeps_its_zeros(folder, llama, documents):
    output = folder / "schedule"
    options = ("--sparsity-schedule", 0.5, 0.75, "--max-steps", 2, "--squarehead-loss-coeff", 0, "--kl-loss-coeff", 1)
    report = run("text", llama, [documents], output, *options)
    assert [result["name"] for result in report["results"]] == ["dense", "one-shot", "trained, 50 %", "trained"]
    assert [round(result["zeros"], 2) for result in report["results"]] == [0, 0.75, 0.5, 0.75]
    half = masked(output / "rung-1" / "model")
    for name, weight in masked(output / "model").items():
        assert not ((half[name] == 0) & (weight != 0)).any()
    assert [line["step"] for line in report["log"] if "kl" in line] == [1, 2, 1, 2]


def test_learned_masks_leave_the_kept_weights_bit_for_bit(folder, llama, documents):
    output = folder / "masks"
    report = run(
        "text", llama, [documents], output, "--pattern", "2:4", "--train", "masks", "--max-steps", 2, "--learning-rate", 0.1
    )
    dense, masks = weights(llama), open_mask_file(output / "mask.npz")
    prior = open_mask_file(output / "pruned.npz")
    assert masks.digest != prior.digest
    for name, weight in weights(output / "model").items():
        mask = masks.mask(name, tuple(weight.shape)) if name in masks.names else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(weight, dense[name] * mask)
    assert "temperature" in report["log"][0]


def test_a_run_starts_from_a_given_mask_file(folder, text_run, llama, documents):
    _, before = text_run
    output = folder / "given"
    run("text", llama, [documents], output, "--pattern", "2:4", "--mask", before / "mask.npz", "--max-steps", 1)
    assert open_mask_file(output / "mask.npz").digest == open_mask_file(before / "mask.npz").digest


def test_translation(folder):
    model = tiny.t5(folder / "t5")
    source, target = tiny.pairs(folder)
    output = folder / "translation"
    report = run(
        "translation", model, [source, target], output, "--eval-data", source, target, "--pattern", "16:32", "--max-steps", 2
    )
    for name in ("dense", "trained"):
        found = json.loads((output / "evaluation" / f"{name}.json").read_text())["outputs"]
        assert [text["reference"] for text in found] == target.read_text().splitlines()
        score = sacrebleu.corpus_bleu([text["prediction"] for text in found], [[text["reference"] for text in found]]).score
        assert report[name]["bleu"] == score
        # Written in batches, with padding, as it is written alone.
        loaded = AutoModelForSeq2SeqLM.from_pretrained(model if name == "dense" else output / "model")
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokens = loaded.generate(**tokenizer(found[3]["source"], return_tensors="pt"), max_new_tokens=LENGTH, do_sample=False)
        assert tokenizer.decode(tokens[0], skip_special_tokens=True) == found[3]["prediction"]
    assert report["evaluation"]["sacrebleu"].startswith("nrefs:1|")


def test_speech(folder):
    model = tiny.whisper(folder / "whisper")
    manifest = tiny.recordings(folder)
    output = folder / "speech"
    options = ("--eval-data", manifest, "--sparsity", 0.6, "--max-steps", 1, "--gradient-checkpointing")
    report = run("speech", model, [manifest], output, *options)
    assert report["measure"] == "wer" and report["evaluation"]["normalizer"] == "english"
    assert math.isclose(report["results"][-1]["zeros"], 0.6, abs_tol=0.01)
    found = json.loads((output / "evaluation" / "trained.json").read_text())["outputs"]
    assert [text["reference"] for text in found] == tiny.sentences(6)
    assert AutoModelForSpeechSeq2Seq.from_pretrained(output / "model").config.model_type == "whisper"
    assert (output / "model" / "preprocessor_config.json").exists()


def test_a_killed_run_goes_on_where_it_was(ranks, folder, llama, documents, text_run, capsys):
    """The weights are those of the run that nothing interrupted, which made its pruning, batches and steps in one process."""
    options = ("--pattern", "2:4", "--max-steps", 4, "--learning-rate", 1e-3, "--save-steps", 1)
    whole, killed = folder / "whole", folder / "killed"
    run("text", llama, [documents], whole, *options)
    words = ["-m", "maskllm", *command("text", llama, [documents], killed, *options)]
    with (folder / "killed.log").open("w") as log:
        job = ranks.start(None, words, [log.fileno(), log.fileno()])
        while job.poll() is None and not any((killed / "checkpoints").glob("checkpoint-[1-3]/complete")):
            time.sleep(0.01)
        job.kill()
    assert not (killed / "model").exists()
    torn = killed / "checkpoints" / "checkpoint-99"  # as a kill in the middle of writing would leave it
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{")
    run("text", llama, [documents], killed, *options)
    assert re.search(r"\[measure one-shot\] done before\n\[train 2:4\]\ngoes on from checkpoint-[1-9]\n", capsys.readouterr().err)
    resumed, wanted = weights(killed / "model"), weights(whole / "model")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in wanted.items())


def test_a_run_that_failed_after_its_last_step_trains_no_more(folder, llama, documents, monkeypatch):
    options = ("--pattern", "2:4", "--max-steps", 3, "--learning-rate", 1e-2, "--lr-scheduler-type", "constant_with_warmup")
    whole, failed = folder / "whole-constant", folder / "failed-constant"
    run("text", llama, [documents], whole, *options)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model")

    with monkeypatch.context() as patch:
        patch.setattr("maskllm.finetuning.run._Run._save", full)
        assert main(command("text", llama, [documents], failed, *options)) == 1
    report = run("text", llama, [documents], failed, *options)
    assert max(line["step"] for line in report["log"]) == 3
    resumed, wanted = weights(failed / "model"), weights(whole / "model")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in wanted.items())
    (failed / "checkpoints").mkdir()  # as a kill before their removal would leave them
    run("text", llama, [documents], failed, *options)
    assert not (failed / "checkpoints").exists()


def test_two_processes_get_the_result_of_one(ranks, folder, llama, documents, held_out, text_run):
    report, _ = text_run
    output = folder / "two"
    options = ("--eval-data", held_out, "--pattern", "2:4", "--max-steps", 6, "--learning-rate", 1e-3, *KL)
    words = command("text", llama, [documents], output, *options, "--per-device-train-batch-size", 2)
    ranks(2, "maskllm", *words)
    found = json.loads((output / "report.json").read_text())
    assert found["dense"] == report["dense"] and found["one_shot"] == report["one_shot"]
    assert math.isclose(found["trained"]["perplexity"], report["trained"]["perplexity"], rel_tol=1e-5)


def test_an_error_of_one_process_ends_all_and_is_said_once(ranks, llama, documents, tmp_path):
    words = command("text", llama, [documents], tmp_path / "out", "--pattern", "2:4", "--max-steps", 4)
    done = ranks(2, "tests.finetuning.patched_command", "failing", *words, check=False)
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1 and "maskllm finetune: error: the second process fails\n" in done.stderr
    assert not (tmp_path / "out" / "model").exists()


def test_fsdp2_resumes_and_gives_the_result_of_one_process(ranks, folder, llama, documents, held_out, text_run, monkeypatch):
    """With what `accelerate launch --use_fsdp --fsdp_version 2` sets."""
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}.items():
        monkeypatch.setenv(name, value)
    report, whole = text_run
    output = folder / "fsdp2"
    options = ("--eval-data", held_out, "--pattern", "2:4", "--max-steps", 6, "--learning-rate", 1e-3, "--save-steps", 1, *KL)
    words = command("text", llama, [documents], output, *options, "--per-device-train-batch-size", 2)
    with (folder / "fsdp2.log").open("w") as log:
        job = ranks.start(2, ["-m", "tests.finetuning.patched_command", "sharded", *words], [log.fileno()] * 4)
        while job.poll() is None and not any((output / "checkpoints").glob("checkpoint-[1-5]/complete")):
            time.sleep(0.01)
        job.kill()
    assert any((output / "checkpoints").glob("checkpoint-*/*_fsdp*")), (folder / "fsdp2.log").read_text()
    ranks(2, "tests.finetuning.patched_command", "sharded", *words)
    found = json.loads((output / "report.json").read_text())
    assert found["dense"] == report["dense"] and found["one_shot"] == report["one_shot"]
    assert math.isclose(found["trained"]["perplexity"], report["trained"]["perplexity"], rel_tol=1e-5)
    assert open_mask_file(output / "mask.npz").digest == open_mask_file(whole / "mask.npz").digest
    loaded = weights(output / "model")
    for name, wanted in weights(whole / "model").items():
        torch.testing.assert_close(loaded[name], wanted, rtol=1e-2, atol=1e-4)  # written in bf16


def test_fsdp_that_accelerate_ignores_is_refused(llama, documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(command("text", llama, [documents], tmp_path / "out", "--pattern", "2:4")) == 1
    assert "FSDP: accelerate shards models on GPUs only" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "wanted one of --pattern N:M, --sparsity SHARE and --sparsity-schedule SHARE ..., found none"),
        (("--pattern", "2:4", "--sparsity", 0.5), "found --pattern, --sparsity"),
        (("--sparsity", 1), "--sparsity 1.0: wanted at least 0 and less than 1"),
        (("--sparsity-schedule", 0.5, 0.4), "--sparsity-schedule 0.5 0.4: wanted rising shares"),
        (("--sparsity", 0.5, "--train", "masks"), "--train masks: masks are learned for a --pattern N:M only"),
        (("--pattern", "16:32", "--train", "both"), "pattern 16:32 has 601080390 candidate masks"),
        (("--pattern", "2:4", "--update-weights"), "--update-weights: goes with --method sparsegpt only"),
        (("--sparsity", 0, "--teacher", "x"), "--sparsity 0: the dense model has no teacher"),
        (("--pattern", "2:4", "--language", "hindi"), "--language: goes with --task speech only"),
        (("--pattern", "2:4", "--max-steps", 0), "--max-steps 0: wanted a positive number"),
        (("--pattern", "2:4", "--learning-rate", "nan"), "--learning-rate nan: wanted a positive number"),
        (("--pattern", "2:4", "--max-length", 100), "--max-length 100: the model's context has 64 tokens"),
        (("--pattern", "2:4", "--ce-loss-coeff", 0, "--squarehead-loss-coeff", 0), "nothing is minimized"),
        (("--pattern", "24:48",), "input dimension 32 is not a multiple of 48"),
        (("--pattern", "2:4", "--mask", "missing.npz"), "missing.npz: no such mask file"),
        (("--pattern", "2:4", "--teacher", "x", "--squarehead-loss-coeff", 0), "--teacher: no term of the loss uses it"),
        (("--pattern", "2:4", "--train", "masks", "--teacher", "x"), "--teacher: no term of the loss uses it"),
        (("--pattern", "2:4", "--train", "masks", "--weights-learning-rate", 1e-3), "--weights-learning-rate: goes with --train both only"),
        (("--pattern", "2:4", "--gumbel-scale-range", 1, 2), "--gumbel-scale-range: goes with --train masks or both only"),
        (("--pattern", "2:4", "--weight-reg", 1e-4), "--weight-reg: goes with --train masks or both only"),
        (("--pattern", "2:4", "--kl-temperature", 2), "--kl-temperature: goes with --kl-loss-coeff only"),
    ],
)  # fmt: skip
def test_options_that_cannot_work_are_refused(options, message, llama, documents, tmp_path, capsys):
    assert main(command("text", llama, [documents], tmp_path / "out", *options)) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out").exists(), "a refused command leaves nothing that would refuse the corrected one"


def test_a_mask_file_that_does_not_fit_is_refused_before_anything_is_measured(llama, documents, text_run, tmp_path, capsys):
    mask = text_run[1] / "mask.npz"
    larger = tiny.llama(tmp_path / "larger", hidden=64)
    for model, options, message in (
        (
            larger,
            ("--pattern", "2:4"),
            "mask.npz: the mask of model.layers.0.self_attn.q_proj.weight is uint8 [128], wanted uint8 [512]",
        ),
        (llama, ("--pattern", "1:4"), "keeps 2 weights; --pattern 1:4 wants 1"),
        (llama, ("--pattern", "1:4", "--train", "masks"), "keeps 2 weights; --pattern 1:4 wants 1"),
        (llama, ("--sparsity", 0.75), "mask.npz: removes 50.0 % of the weights, wanted 75 %"),
    ):
        assert main(command("text", model, [documents], tmp_path / "out", "--mask", mask, *options)) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_mixture_of_experts_is_refused_before_anything_is_measured(documents, tmp_path, capsys):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tiny.VOCABULARY), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = tiny.saved(MixtralForCausalLM(config), tmp_path / "model", f"{tiny.START} $A")
    assert main(command("text", model, [documents], tmp_path / "out", "--pattern", "2:4")) == 1
    assert "the weights of 2 experts; mixture of experts is not supported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_in_another_order_are_another_run(llama, documents, held_out, tmp_path, capsys):
    """The order decides which examples are held out, and which masks they draw."""
    options = ("--pattern", "2:4", "--max-steps", 1, "--squarehead-loss-coeff", 0)
    run("text", llama, [documents, held_out], tmp_path / "out", *options)
    assert main(command("text", llama, [held_out, documents], tmp_path / "out", *options)) == 1
    sizes = [f"{path.resolve()} ({path.stat().st_size} bytes)" for path in (documents, held_out)]
    error = capsys.readouterr().err
    assert f"holds a run with --data {' '.join(sizes)}, not {' '.join(reversed(sizes))}; give the same options" in error


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_standard_error(terminal, llama, documents, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run("text", llama, [documents], tmp_path / "out", "--pattern", "2:4", "--max-steps", 3, "--logging-steps", 1, *KL)
    shown = capsys.readouterr()
    assert "{" not in shown.out and shown.out.startswith("model")
    if terminal:
        assert "3/3" in shown.err and "cross_entropy" in shown.err.rpartition("3/3")[2]
        assert "step 1 of 3" not in shown.err
    else:
        steps = [line for line in shown.err.splitlines() if line.startswith("step ")]
        assert [line.partition(":")[0] for line in steps] == [f"step {step} of 3" for step in (1, 2, 3)]
        assert "loss " in steps[0] and "cross_entropy " in steps[0] and "{" not in steps[0]
        assert re.search(r"^prune: layer 1 of 2, model\.layers\.0: q_proj 0\.\d{3} ", shown.err, re.MULTILINE)
        assert re.search(r"^perplexity: batch (\d+) of \1$", shown.err, re.MULTILINE) and "\r" not in shown.err


def test_the_output_of_something_else_stays(llama, documents, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("")
    assert main(command("text", llama, [documents], tmp_path, "--pattern", "2:4")) == 1
    assert f"--output {tmp_path}: exists and holds no run of maskllm finetune" in capsys.readouterr().err


def test_another_model_in_the_same_folder_is_another_run(documents, tmp_path, capsys):
    model = tiny.llama(tmp_path / "model")
    options = ("--pattern", "2:4", "--max-steps", 1, "--squarehead-loss-coeff", 0)
    run("text", model, [documents], tmp_path / "out", *options)
    changed = AutoModelForCausalLM.from_pretrained(model)
    changed.model.norm.weight.data.mul_(2)
    before = weights_sha256(model)
    changed.save_pretrained(model)
    assert main(command("text", model, [documents], tmp_path / "out", *options)) == 1
    error = capsys.readouterr().err
    assert f"holds a run with --model {model} (weights {before}), not {model} (weights {weights_sha256(model)}); give" in error


def test_recordings_that_are_not_scored_do_not_count(tmp_path):
    manifest = tiny.recordings(tmp_path)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    lines[0]["text"] = "null eins"  # no English digit
    tiny.json_lines(manifest, lines)
    options = ("--eval-data", manifest, "--sparsity", 0, "--max-steps", 1, "--normalizer", "digits")
    report = run("speech", tiny.whisper(tmp_path / "model"), [manifest], tmp_path / "out", *options)
    assert report["evaluation"]["examples"] == len(lines) - 1


def test_a_teacher_of_another_shape_is_refused(llama, documents, tmp_path, capsys):
    teacher = tiny.llama(tmp_path / "teacher", hidden=64)
    assert main(command("text", llama, [documents], tmp_path / "out", "--pattern", "2:4", "--teacher", teacher)) == 1
    assert (
        "model.embed_tokens.weight is [24, 64], that of --model is [24, 32]; wanted a model of the same shape"
        in capsys.readouterr().err
    )
    deeper = LlamaForCausalLM(LlamaConfig(**AutoConfig.from_pretrained(llama).to_dict() | {"num_hidden_layers": 3}))
    deeper.save_pretrained(tmp_path / "deeper")
    assert main(command("text", llama, [documents], tmp_path / "out", "--pattern", "2:4", "--teacher", tmp_path / "deeper")) == 1
    assert "weight is [32, 32], that of --model is missing; wanted a model of the same shape" in capsys.readouterr().err
