"""`maskllm.json`: written and read back, and every contradiction in it is named."""

from __future__ import annotations

import json

import pytest

from maskllm.checkpoints.checksums import write_manifest
from maskllm.checkpoints.info import INFO, CheckpointInfo
from maskllm.checkpoints.reading import resolve
from maskllm.errors import MaskLLMError

from .changed import write_changed


def test_info_is_read_as_it_was_written(llama3_dense, tmp_path):
    info = CheckpointInfo("pruned", "some/model", "2:4", "wanda", {"calibration": [1, 2]})
    write_changed(resolve(llama3_dense), tmp_path / "b", {}, info)
    assert resolve(tmp_path / "b").info == info


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format_version": 2}, "format_version 2 is newer than this program's 1"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"stage": "half-done"}, "stage 'half-done'"),
        ({"stage": "trained"}, "wanted a pattern"),
        ({"stage": "trained", "pattern": 3}, "maskllm.json: pattern 3; wanted N:M"),
        ({"stage": "trained", "pattern": "9:4"}, "maskllm.json: pattern 9:4: wanted N:M"),
        ({"details": ["x"]}, "maskllm.json: details ['x']; wanted a JSON object"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_contradiction_is_named(dense, values, words):
    path = dense / "release" / INFO
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    write_manifest(path.parent)
    with pytest.raises(MaskLLMError) as caught:
        resolve(dense)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
