"""Reading a checkpoint, tensor by tensor or into a model: what is missing, damaged or contradicts the config is named."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state

from maskllm.checkpoints.checksums import MANIFEST, write_manifest
from maskllm.checkpoints.finding import LATEST
from maskllm.checkpoints.reading import load_model, load_tensors, resolve
from maskllm.checkpoints.saving import CheckpointSaver
from maskllm.errors import MaskLLMError
from maskllm.megatron.build import build_model

from .changed import write_changed
from .conftest import flip_a_bit, read_everything


def junk_index(root) -> None:
    """An index that was not readable when it was written."""
    (root / "release" / ".metadata").write_bytes(b"junk")
    write_manifest(root / "release")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "release" / MANIFEST).unlink(), "release: not complete, it has no manifest.json"),
        (lambda root: (root / LATEST).write_text("../x"), "holds '../x'; wanted 'release' or an iteration number"),
        (junk_index, ".metadata: cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(dense, spoil, words):
    spoil(dense)
    with pytest.raises(MaskLLMError) as caught:
        read_everything(dense)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_weight_that_contradicts_the_config_is_named(llama3_dense, tmp_path):
    checkpoint = resolve(llama3_dense)
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    write_changed(checkpoint, tmp_path / "b", {key: torch.ones(32, 44)})
    with pytest.raises(MaskLLMError, match=rf"{key} has shape \[32, 44\]; the model's config asks for \[32, 48\]"):
        resolve(tmp_path / "b").check_weights()
    write_changed(checkpoint, tmp_path / "b", {key: None})
    with pytest.raises(MaskLLMError, match=f"has no tensor {key}"):
        resolve(tmp_path / "b").check_weights()


@pytest.mark.usefixtures("megatron")
def test_a_damaged_file_is_named_when_a_model_is_loaded(dense):
    file = max((dense / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip_a_bit(file)
    checkpoint = resolve(dense)  # does not read the tensors
    model = build_model(checkpoint.model_config, params_dtype=torch.bfloat16)
    with pytest.raises(MaskLLMError, match="found checksum") as caught:
        load_model(checkpoint, model)
    assert str(caught.value).startswith(f"{file}: ")


class NormWithExtraState(torch.nn.RMSNorm):
    """A norm with state of 8-bit training, as Transformer Engine's norms have it and no checkpoint here does."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        raise AssertionError("the checkpoint holds none")


@pytest.mark.usefixtures("megatron")
def test_extra_state_is_neither_written_nor_wanted(llama3_dense, tmp_path):
    checkpoint = resolve(llama3_dense)
    model = build_model(checkpoint.model_config, params_dtype=torch.bfloat16)
    for layer in model.decoder.layers:
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            norm = getattr(layer, name)
            setattr(layer, name, NormWithExtraState(norm.normalized_shape, eps=norm.eps, dtype=torch.bfloat16))
    assert "decoder.layers.0.input_layernorm._extra_state" in model.state_dict()
    load_model(checkpoint, model)
    key = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
    assert torch.equal(model.decoder.layers[1].pre_mlp_layernorm.weight, checkpoint.tensors[key].load())
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    CheckpointSaver(tmp_path / "b", checkpoint.hf_directory).save(3, state, checkpoint.info)
    with pytest.raises(MaskLLMError, match=r"differ in output_layer\.weight, and 0 others"):
        load_tensors(model, {name: value for name, value in model.named_parameters() if name != "output_layer.weight"})
    stored = resolve(tmp_path / "b").tensors
    assert set(stored) == set(checkpoint.tensors)
    assert not [name for name in stored._reader.metadata.state_dict_metadata if "extra_state" in name]
