"""The hash of a directory's weights: of the tensors, however files hold them; any changed bit changes it."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskllm.huggingface.weights_hash import WeightsHash, weights_sha256

TENSORS = {
    "b": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 3, dtype=torch.float16),
}


def hash_of(tensors):
    found = WeightsHash()
    for name, tensor in tensors.items():
        found.add(name, tensor)
    return found.hexdigest()


def test_the_hash_is_the_documented_text():
    def line(name, dtype, shape, data):
        return f"{name}\t{dtype}\t{shape}\t{hashlib.sha256(data).hexdigest()}\n"

    text = line("a", "bfloat16", "2", b"\xc0\x3f\x00\x80")
    text += line("b", "float32", "3,4", TENSORS["b"].numpy().tobytes())
    text += line("empty", "float16", "0,3", b"") + line("scalar", "int64", "", (7).to_bytes(8, "little"))
    assert hash_of(TENSORS) == hashlib.sha256(text.encode()).hexdigest()


def test_shards_order_and_layout_in_memory_do_not_matter(tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    for folder in (one, many):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    save_file(TENSORS, one / "model.safetensors", metadata={"format": "pt"})
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, many / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (many / "model.safetensors.index.json").write_text(json.dumps(index))
    (many / "other.safetensors").write_bytes((one / "model.safetensors").read_bytes())
    transposed = TENSORS | {"b": TENSORS["b"].T.contiguous().T}
    assert weights_sha256(one) == weights_sha256(many) == hash_of(transposed) == hash_of(dict(reversed(TENSORS.items())))


@pytest.mark.parametrize(
    "changed",
    [
        {"b": TENSORS["b"].reshape(4, 3)},
        {"b": TENSORS["b"].view(torch.int32)},
        {"a": torch.tensor([1.5, 0.0], dtype=torch.bfloat16)},
        {"c": TENSORS["b"]},
    ],
)
def test_shape_dtype_sign_of_zero_and_name_matter(changed):
    assert hash_of(TENSORS | changed) != hash_of(TENSORS)


def test_export_states_the_hash_of_what_it_wrote_and_nothing_passes_it_on(tiny_dense, tiny_hf, tmp_path):
    from maskllm.checkpoints.convert import convert
    from maskllm.export.huggingface import export

    whole, sharded = (
        export(tiny_dense, tmp_path / name, max_shard_size=size) for name, size in (("whole", "5GB"), ("sharded", "50KB"))
    )
    stated = [json.loads((tmp_path / name / "weights_sha256.json").read_text()) for name in ("whole", "sharded")]
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert whole.weights_sha256 == sharded.weights_sha256 == weights_sha256(tmp_path / "sharded") == weights_sha256(tiny_hf)
    assert stated == [{"weights_sha256": whole.weights_sha256}] * 2
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    assert hash_of(tensors) == whole.weights_sha256
    convert(str(tmp_path / "whole"), str(tmp_path / "again"))
    assert not list((tmp_path / "again").rglob("weights_sha256.json"))
