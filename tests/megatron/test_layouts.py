"""A converted checkpoint loads under any layout into a model with the same logits, and any layout writes the same checkpoint."""

from __future__ import annotations

import pytest
import torch

from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.reading import resolve
from tests.families.tiny import write_tiny


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "tp", "pp", "names"),
    [
        ("upstream", 2, 1, ["biases"]),
        (
            "ours",
            2,
            1,
            ["nemotron", "gpt2_untied", "attention_bias", "mistral", "qwen2", "qwen2_window", "qwen3", "gemma2", "gemma3", "phi3"],
        ),
        (
            "ours",
            1,
            2,
            [
                "llama3.2",
                "gpt2",
                "mlp_bias",
                "mistral_without_window",
                "qwen2_window",
                "qwen3_biases",
                "gemma2_without_caps",
                "gemma3",
                "phi3_window",
            ],
        ),
        ("sequence-parallel", 2, 1, ["dynamic", "gemma3"]),
    ],
)
def test_a_layout_loads_and_saves_the_same_model(spec, tp, pp, names, ranks, tmp_path):
    tokens = torch.randint(96, (2, 160), generator=torch.Generator().manual_seed(0))
    models = {tmp_path / name: write_tiny(name, tmp_path / name / "hf") for name in names}
    for path in models:
        convert(path / "hf", path / "dense")
        torch.save(tokens, path / "tokens.pt")
    ranks(tp * pp, "tests.megatron.layout_worker", spec, tp, pp, *models)
    for path, model in models.items():
        with torch.no_grad():
            expected = model(tokens).logits
        torch.testing.assert_close(torch.load(path / "logits.pt", weights_only=True), expected, rtol=0, atol=2e-4)
        before, after = resolve(path / "dense").tensors, resolve(path / "CKPT").tensors
        assert resolve(path / "CKPT").iteration == 7
        assert set(before) == set(after)
        for key in before:
            assert torch.equal(before[key].load(), after[key].load()), key
        failures = [(path / f"failure-{rank}").read_text() for rank in range(tp * pp)]
        assert all("tokens.pt" in failure for failure in failures), "a failure of rank 0 was not raised on every rank"
