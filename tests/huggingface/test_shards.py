"""Files that are written one tensor at a time: the same bytes as safetensors' own writer gives."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskllm.errors import MaskLLMError
from maskllm.huggingface.shards import TensorSpec, write_shards

NAMES = {
    **{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_a_file_has_the_bytes_of_safetensors_own_writer(tmp_path):
    tensors = {
        f"layer.{shape}.{name}": torch.ones(shape).to(dtype) for shape in ((3, 5), (7,), ()) for dtype, name in NAMES.items()
    }
    tensors |= {"größe": torch.arange(3), "empty": torch.empty(0, 4), 'a "quote"': torch.ones(1)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    with write_shards(tmp_path, specs(tensors)) as writer:
        for name in sorted(tensors, key=lambda name: hash(name)):
            writer.write(name, tensors[name])
    assert writer.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_shards_and_their_index(tmp_path):
    tensors = {f"layer.{index}": torch.full((100,), index, dtype=torch.int32) for index in range(10)}
    with write_shards(tmp_path, specs(tensors), "1KB") as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4000}
    files = set(index["weight_map"].values())
    assert files == {f"model-{number:05}-of-00005.safetensors" for number in range(1, 6)}
    found = {file: load_file(tmp_path / file) for file in files}
    assert all(torch.equal(found[index["weight_map"][name]][name], tensor) for name, tensor in tensors.items())


def test_a_dtype_without_whole_bytes_is_refused(tmp_path):
    with pytest.raises(MaskLLMError, match="a tensor of type F4; wanted one of"):
        TensorSpec("F4", (2,)).nbytes  # noqa: B018


def test_a_tensor_that_is_forgotten_or_another_one(tmp_path):
    with pytest.raises(AssertionError, match="not written"), write_shards(tmp_path, specs({"a": torch.ones(2)})):
        pass
    (tmp_path / "other").mkdir()
    with (
        pytest.raises(AssertionError, match="not the announced"),
        write_shards(tmp_path / "other", specs({"b": torch.ones(2)})) as writer,
    ):
        writer.write("b", torch.ones(3))
