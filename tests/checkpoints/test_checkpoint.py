"""The checkpoint directory: complete or not there, and every contradiction named."""

from __future__ import annotations

import binascii
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from maskllm.checkpoints.checksums import MANIFEST, FileRecord, Manifest, write_manifest
from maskllm.checkpoints.convert import convert
from maskllm.checkpoints.finding import LATEST, iterations
from maskllm.checkpoints.info import INFO, CheckpointInfo
from maskllm.checkpoints.reading import load_model, load_tensors, open_iteration, resolve
from maskllm.checkpoints.saving import CheckpointSaver
from maskllm.checkpoints.torch_dist import LazyTensor
from maskllm.checkpoints.writing import write_checkpoint
from maskllm.errors import MaskLLMError
from maskllm.megatron.build import build_model
from maskllm.megatron.process_groups import parallel_processes
from tests.families.tiny import write_tiny


@pytest.fixture
def dense(tmp_path):
    write_tiny("llama3", tmp_path / "hf", torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "dense")
    return tmp_path / "dense"


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def test_the_root_and_the_iteration_are_the_same_checkpoint(dense):
    assert resolve(dense).path == resolve(dense / "release").path == dense / "release"
    assert (dense / LATEST).read_text() == "release\n"
    assert resolve(dense).iteration == "release"


def test_the_latest_iteration_is_the_one_that_is_named(dense):
    for number in (8, 12, 16):
        shutil.copytree(dense / "release", dense / f"iter_{number:07d}")
    (dense / LATEST).write_text("12")
    assert resolve(dense).path == dense / "iter_0000012"
    assert resolve(dense).iteration == 12
    lines = []
    assert [path.name for path in iterations(dense, say=lines.append)] == ["iter_0000012", "iter_0000008"]
    assert lines == [f"{dense / 'iter_0000016'}: newer than iter_0000012, which {LATEST} names; ignored"]


def test_the_newest_complete_iteration_is_found_without_being_named(dense):
    for number in (8, 12, 16):
        shutil.copytree(dense / "release", dense / f"iter_{number:07d}")
    (dense / LATEST).unlink()
    assert resolve(dense).iteration == 16
    (dense / "iter_0000016" / MANIFEST).unlink()  # it is written last
    lines = []
    assert open_iteration(iterations(dense, say=lines.append)[0]).iteration == 12
    assert lines == [f"{dense / 'iter_0000016'}: not complete, it has no {MANIFEST}; ignored"]
    (dense / LATEST).write_text("16")
    lines.clear()
    assert open_iteration(iterations(dense, say=lines.append)[0]).iteration == 12
    assert (
        lines[-1] == f"{dense / 'iter_0000016'}: not complete, it has no {MANIFEST}, though {LATEST} names it; using iter_0000012"
    )


def test_a_complete_iteration_counts_where_its_save_was_killed_before_it_was_named(dense):
    for number in (8, 12, 16):
        shutil.copytree(dense / "release", dense / f"iter_{number:07d}")
    (dense / LATEST).write_text("12\n")
    os.utime(dense / LATEST, ns=(0, (dense / "iter_0000016" / MANIFEST).stat().st_mtime_ns - 1))
    lines = []
    assert [path.name for path in iterations(dense, say=lines.append)] == ["iter_0000016", "iter_0000012", "iter_0000008"]
    assert lines == [f"{dense / 'iter_0000016'}: complete, and newer than {LATEST}, which names iter_0000012; using iter_0000016"]
    (dense / LATEST).write_text("8\n")  # by hand, after it
    assert resolve(dense).iteration == 8


def test_other_words_are_passed_over_only_where_that_was_asked_for(dense):
    shutil.copytree(dense / "release", dense / "iter_0000008")
    (dense / LATEST).write_text("v\n")
    with pytest.raises(MaskLLMError, match="holds 'v'"):
        iterations(dense)
    lines = []
    assert iterations(dense, fall_back=True, say=lines.append) == [dense / "iter_0000008"]
    assert lines == [f"{dense / LATEST}: holds 'v'; wanted 'release' or an iteration number; --auto-fallback: ignored"]


@pytest.mark.parametrize(
    ("latest", "words"), [(b"", "is empty or not text; ignored"), (b"\0\0\0", "is empty or no"), (b"3", "iter_0000003: no such")]
)
def test_a_file_that_names_nothing_does_not_hide_what_is_complete(dense, latest, words):
    (dense / LATEST).write_bytes(latest)
    lines = []
    assert open_iteration(iterations(dense, say=lines.append)[0]).iteration == "release"
    assert words in lines[0]
    shutil.copytree(dense / "release", dense / "iter_0000008")
    assert resolve(dense).iteration == 8
    shutil.rmtree(dense / "iter_0000008")
    shutil.rmtree(dense / "release")
    with pytest.raises(MaskLLMError, match="no complete iteration" if latest != b"3" else "there is no other to use"):
        resolve(dense)


def test_an_interrupted_write_leaves_the_older_checkpoint(dense):
    before = {file.name: file.stat().st_mtime_ns for file in (dense / "release").iterdir()}
    written = []

    def fail():
        written.extend((dense / ".release.tmp").glob("*.distcp"))
        raise KeyboardInterrupt

    tensors = {"a": lazy(torch.ones(3)), "b": LazyTensor((3,), torch.float32, fail)}
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(dense, tensors, resolve(dense).info, hf_files_from=dense / "release" / "hf", description="")
    assert written, "nothing had been written when the interruption came"
    assert {file.name: file.stat().st_mtime_ns for file in (dense / "release").iterdir()} == before
    assert sorted(file.name for file in dense.iterdir()) == [LATEST, "release"]


def test_a_directory_of_someone_elses_is_not_replaced(dense, tmp_path):
    (tmp_path / "other" / "release").mkdir(parents=True)
    with pytest.raises(MaskLLMError, match="exists and is not a checkpoint of this program"):
        convert(tmp_path / "hf", tmp_path / "other")


def test_a_directory_of_a_run_is_no_place_for_another_checkpoint(dense):
    shutil.copytree(dense / "release", dense / "iter_0000008")
    with pytest.raises(MaskLLMError, match="holds the checkpoints of a run; name another --output"):
        convert(dense.parent / "hf", dense)


def edit_info(root, **values) -> None:
    path = root / "release" / INFO
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    write_manifest(path.parent)


def spoil_index(root) -> None:
    """An index that has been junk from the start."""
    (root / "release" / ".metadata").write_bytes(b"junk")
    write_manifest(root / "release")


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "release" / INFO).unlink(), "maskllm.json: no such file, though manifest.json lists it"),
        (lambda root: (root / "release" / MANIFEST).unlink(), "release: not complete, it has no manifest.json"),
        (lambda root: (root / "release" / MANIFEST).write_text("{}"), "manifest.json: format_version is None, wanted 1"),
        (lambda root: (root / "release" / MANIFEST).write_text(""), "manifest.json: line 1: not JSON"),
        (lambda root: flip_a_bit(root / "release" / ".metadata"), ".metadata: found checksum"),
        (lambda root: flip_a_bit(root / "release" / "hf" / "config.json"), "config.json: found checksum"),
        (lambda root: flip_a_bit(next((root / "release").glob("*.distcp"))), ".distcp: found checksum"),
        (lambda root: (root / LATEST).write_text("../x"), "holds '../x'; wanted 'release' or an iteration number"),
        (lambda root: (root / "release" / INFO).write_text("{"), "maskllm.json: found 1 bytes, wanted"),
        (lambda root: edit_info(root, format_version=2), "format_version 2 is newer than this program's 1"),
        (lambda root: edit_info(root, format_version="1"), "format_version is '1'"),
        (lambda root: edit_info(root, stage="half-done"), "stage 'half-done'"),
        (lambda root: edit_info(root, stage="trained"), "wanted a pattern"),
        (lambda root: edit_info(root, stage="trained", pattern=3), "maskllm.json: pattern 3; wanted N:M"),
        (lambda root: edit_info(root, stage="trained", pattern="9:4"), "maskllm.json: pattern 9:4: wanted N:M"),
        (lambda root: edit_info(root, details=["x"]), "maskllm.json: details ['x']; wanted a JSON object"),
        (lambda root: edit_info(root, colour="red"), "colour"),
        (lambda root: (root / "release" / ".metadata").unlink(), ".metadata: no such file"),
        (spoil_index, ".metadata: cannot be read"),
        (lambda root: (root / "release" / "hf" / "config.json").unlink(), "config.json: no such file"),
        (lambda root: next((root / "release").glob("*.distcp")).write_bytes(b""), ".distcp: found 0 bytes, wanted"),
    ],
)
def test_what_is_wrong_is_named(dense, spoil, words):
    spoil(dense)
    with pytest.raises(MaskLLMError) as error:
        checkpoint = resolve(dense)
        checkpoint.check_weights()
        for key in checkpoint.tensors:
            checkpoint.tensors[key].load()
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_not_a_checkpoint_at_all(tmp_path):
    with pytest.raises(MaskLLMError, match="no such directory"):
        resolve(tmp_path / "nothing")
    with pytest.raises(MaskLLMError, match="not a checkpoint"):
        resolve(tmp_path)


def test_a_weight_that_contradicts_the_config_is_named(dense, tmp_path):
    checkpoint = resolve(dense)
    key = "decoder.layers.1.mlp.linear_fc2.weight"
    tensors = dict(checkpoint.tensors) | {key: lazy(torch.ones(32, 44))}
    write_checkpoint(tmp_path / "b", tensors, checkpoint.info, hf_files_from=checkpoint.hf_directory, description="")
    with pytest.raises(MaskLLMError, match=rf"{key} has shape \[32, 44\]; the model's config asks for \[32, 48\]"):
        resolve(tmp_path / "b").check_weights()
    del tensors[key]
    write_checkpoint(tmp_path / "b", tensors, checkpoint.info, hf_files_from=checkpoint.hf_directory, description="")
    with pytest.raises(MaskLLMError, match=f"has no tensor {key}"):
        resolve(tmp_path / "b").check_weights()


@pytest.mark.parametrize("name", ["common.pt", "metadata.json", ".metadata", "__0_0.distcp"])
def test_a_missing_file_is_named(dense, tmp_path, name):
    shutil.copytree(dense, tmp_path / "b")
    (tmp_path / "b" / "release" / name).unlink()
    with pytest.raises(MaskLLMError, match=re.escape(name)) as caught:
        resolve(tmp_path / "b")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_named_when_a_model_is_loaded(dense):
    file = max((dense / "release").glob("*.distcp"), key=lambda path: path.stat().st_size)
    wanted = Manifest.read(dense / "release").files[file.name].crc32
    flip_a_bit(file)
    found = FileRecord.of(file).crc32
    with parallel_processes():
        checkpoint = resolve(dense)  # which does not read the tensors
        model = build_model(checkpoint.model_config, params_dtype=torch.bfloat16)
        with pytest.raises(MaskLLMError) as caught:
            load_model(checkpoint, model)
    assert str(caught.value).startswith(f"{file}: found checksum {found}, wanted {wanted};")


def test_the_manifest_holds_every_files_size_and_checksum(dense):
    directory = dense / "release"
    found = Manifest.read(directory).files
    expected = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    del expected[MANIFEST]
    assert found == {name: FileRecord(len(data), f"{binascii.crc32(data):08x}") for name, data in expected.items()}


class NormWithExtraState(torch.nn.RMSNorm):
    """A norm that declares, as Transformer Engine's do, state of 8-bit training that no checkpoint here has."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        raise AssertionError("there is none to set")


def test_extra_state_is_neither_written_nor_wanted(dense, tmp_path):
    with parallel_processes():
        checkpoint = resolve(dense)
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
    assert set(resolve(tmp_path / "b").tensors) == set(checkpoint.tensors)
    stored = resolve(tmp_path / "b").tensors
    assert not [name for name in stored._reader.metadata.state_dict_metadata if "extra_state" in name]


@pytest.mark.parametrize("background", [False, True])
def test_a_killed_writer_fails_the_save_and_not_the_ones_after_it(dense, background, tmp_path, monkeypatch):
    """As where memory runs out: the kernel kills one of the processes that write the files, or the one that has started them."""

    def die(*_, results_queue, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    with parallel_processes():
        checkpoint = resolve(dense)
        saver = CheckpointSaver(tmp_path / "run", checkpoint.hf_directory, background=background)
        state = {"w": ShardedTensor.from_rank_offsets("w", torch.ones(1000))}
        with (
            monkeypatch.context() as patched,
            pytest.raises(MaskLLMError, match=r"iter_0000003: cannot be written .*the process that writes it ended before its end"),
        ):
            patched.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(die))
            saver.save(3, state, checkpoint.info)
            saver.finish()
        shutil.rmtree(dense)  # what goes along has been read
        saver.save(4, state, checkpoint.info)
        saver.finish()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["iter_0000004", LATEST]
    assert (tmp_path / "run" / "iter_0000004" / "hf" / "config.json").is_file()


@pytest.fixture
def slow_writer(monkeypatch):
    """Each writer takes a second longer."""
    write = FileSystemWriterAsync.write_preloaded_data

    def slow(*values, **named):
        time.sleep(1)
        return write(*values, **named)

    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(slow))


@pytest.mark.usefixtures("slow_writer")
def test_a_save_that_is_waited_for_tells_that_it_goes_on(dense, tmp_path):
    calls = []
    with parallel_processes():
        saver = CheckpointSaver(tmp_path / "run", resolve(dense).hf_directory, progress=lambda: calls.append(time.monotonic()))
        saver.save(3, {"w": ShardedTensor.from_rank_offsets("w", torch.ones(1000))}, resolve(dense).info)
    assert resolve(tmp_path / "run").iteration == 3
    assert len(calls) > 2
    assert calls[-1] - calls[0] > 0.5, "it was silent while it waited"


@pytest.mark.usefixtures("slow_writer")
def test_a_save_that_takes_too_long_is_ended_and_who_still_writes_is_named(dense, tmp_path):
    with parallel_processes():
        saver = CheckpointSaver(tmp_path / "run", resolve(dense).hf_directory, background=True, timeout=0.3)
        saver.save(3, {"w": ShardedTensor.from_rank_offsets("w", torch.ones(1000))}, resolve(dense).info)
        words = r"iter_0000003: not written within 0 s; ranks still writing: rank 0 on \S+; older checkpoints are as they were"
        with pytest.raises(MaskLLMError, match=words):
            saver.finish()
        time.sleep(1.5)
    assert not list((tmp_path / "run").iterdir()), "the writer goes on"


@pytest.mark.usefixtures("slow_writer")
def test_what_a_failed_run_was_writing_goes(dense, tmp_path):
    with parallel_processes():
        saver = CheckpointSaver(tmp_path / "run", resolve(dense).hf_directory, background=True)
        saver.save(3, {"w": ShardedTensor.from_rank_offsets("w", torch.ones(1000))}, resolve(dense).info)
        assert list((tmp_path / "run").glob(".iter_0000003.*.tmp"))
        saver.abandon()
        assert not list((tmp_path / "run").iterdir())
        time.sleep(1.5)
        assert not list((tmp_path / "run").iterdir()), "the writer goes on"


def test_info_comes_back_as_it_was(dense, tmp_path):
    info = CheckpointInfo("pruned", "some/model", "2:4", "wanda", {"calibration": [1, 2]})
    write_checkpoint(tmp_path / "b", dict(resolve(dense).tensors), info, hf_files_from=dense / "release" / "hf", description="")
    assert resolve(tmp_path / "b").info == info
