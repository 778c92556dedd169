"""A name is a directory or else a hub id; what is downloaded; why the hub does not give something."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from maskllm.errors import MaskLLMError
from maskllm.huggingface.hub import find_source


@pytest.fixture
def asked(monkeypatch, tmp_path) -> list[str]:
    """The ids that the hub is asked for. It gives a directory with a config.json."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text("{}")
    ids = []

    def snapshot_download(repo_id, **_) -> str:
        ids.append(repo_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return ids


@pytest.mark.parametrize("hub_id", ["gpt2", "openai-community/gpt2", "meta-llama/Llama-3.2-1B"])
def test_a_name_that_is_not_on_disk_is_a_hub_id(asked, hub_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_source(hub_id) == tmp_path / "snapshot"
    assert asked == [hub_id]


def test_what_is_on_disk_goes_first(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(MaskLLMError, match=r"gpt2/config\.json: no such file; wanted the directory"):
        find_source("gpt2")
    (tmp_path / "opt").touch()
    with pytest.raises(MaskLLMError, match="opt: is a file; wanted the directory"):
        find_source("opt")
    assert asked == []


@pytest.mark.parametrize("name", ["/no/such/directory", "../models/gpt2", "./gpt2", "a/b/c", "~/gpt2", "my model", "model/"])
def test_other_names_are_not_asked_for(asked, name):
    with pytest.raises(MaskLLMError, match="no such directory, and not a hub id like gpt2 or OWNER/NAME"):
        find_source(name)
    assert asked == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError("some reason\nmore lines"), "some reason"),
        (
            LocalEntryNotFoundError("no network\nmore"),
            "it cannot be reached, and its cache on this machine has no copy (no network)",
        ),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "it has no repository of this name, or a private one"),
        (GatedRepoError.__new__(GatedRepoError), "accept its license on https://huggingface.co/some/model and run `hf auth login`"),
    ],
)
def test_why_the_hub_does_not_give_it_is_one_line(monkeypatch, error, words):
    def snapshot_download(repo_id, **_):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(MaskLLMError) as caught:
        find_source("some/model")
    assert str(caught.value).startswith(f"some/model: no such directory, and the hub does not give it: {words}")
    assert "\n" not in str(caught.value)


def test_only_the_files_that_are_needed_are_downloaded(monkeypatch, tmp_path):
    wanted = [
        *("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "spiece.model", "README.md"),
        "additional_chat_templates/tool_use.jinja",
    ]
    others = [
        *("pytorch_model.bin", "original/tokenizer.model", "adapter/adapter_model.safetensors", "tokenizer/tokenizer.json"),
        *("a/LICENSE", "assets/film.mp4", ".gitattributes", "consolidated.00.pth", "mask_compressed.npz", "onnx/model.onnx"),
    ]
    (tmp_path / "config.json").write_text("{}")
    fetched = []

    def snapshot_download(repo_id, *, allow_patterns, ignore_patterns, **_) -> str:
        fetched.extend(filter_repo_objects(wanted + others, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    find_source("some/model")
    assert fetched == wanted
    fetched.clear()
    find_source("some/model", files=["config.json"])
    assert fetched == ["config.json"]
