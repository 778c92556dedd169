"""The quickstart's settings against the programs that they are for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from maskllm.errors import MaskLLMError
from maskllm.quickstart.pipeline import MIN_DOCUMENTS, QuickstartSettings, train_command
from maskllm.training.arguments import parse_arguments
from maskllm.training.data import build_batches


def test_a_corpus_too_small_for_a_validation_is_trained_on_without_one(tmp_path):
    for documents in (MIN_DOCUMENTS, MIN_DOCUMENTS - 1):
        data = tmp_path / str(documents)
        builder = IndexedDatasetBuilder(f"{data}.bin", dtype=np.uint16)
        for _ in range(documents):
            builder.add_document(torch.arange(1, 101), [100])
        builder.finalize(f"{data}.idx")

        def train(has_validation: bool, data: Path = data):
            words = train_command(QuickstartSettings(), str(data), tmp_path / "prior", tmp_path / "learned", has_validation)
            arguments = parse_arguments([str(word) for word in words[words.index("maskllm.train") + 1 :]])
            return build_batches(arguments, 256, torch.device("cpu"))

        if documents == MIN_DOCUMENTS:
            _, validation = train(has_validation=True)
            assert validation is not None
        else:
            with pytest.raises(MaskLLMError, match="leaves no text for validation"):
                train(has_validation=True)
            _, validation = train(has_validation=False)
            assert validation is None
