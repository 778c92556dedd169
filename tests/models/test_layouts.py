"""A converted checkpoint loads into Megatron's model under any layout, and what any layout writes is the same checkpoint."""

from __future__ import annotations

import pytest
import torch

from maskllm.models.checkpoint import resolve
from maskllm.models.convert import convert
from tests.conftest import torchrun
from tests.models.tiny import write_tiny


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "tp", "pp", "name"),
    [("upstream", 2, 1, "biases"), ("ours", 1, 2, "llama3.2")],
)
def test_layout_loads_and_saves_the_same_model(spec, tp, pp, name, tmp_path):
    model = write_tiny(name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "dense")
    tokens = torch.randint(96, (2, 160), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    torchrun(tp * pp, "tests.models.layout_worker", spec, tp, pp, tmp_path / "dense", tmp_path)
    if pp == 1:
        with torch.no_grad():
            expected = model(tokens).logits
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), expected, rtol=0, atol=2e-4)
    before, after = resolve(tmp_path / "dense").tensors, resolve(tmp_path / "CKPT").tensors
    assert resolve(tmp_path / "CKPT").iteration == 7
    assert set(before) == set(after)
    for key in before:
        assert torch.equal(before[key].load(), after[key].load()), key
    failures = [(tmp_path / f"failure-{rank}").read_text() for rank in range(tp * pp)]
    assert all("tokens.pt" in failure for failure in failures), "a failure of rank 0 was not raised on every rank"
