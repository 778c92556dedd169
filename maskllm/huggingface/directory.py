"""The directory of a Hugging Face checkpoint, on disk or downloaded from the hub, and the files in it that are not weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from maskllm.errors import MaskLLMError, first_line
from maskllm.files import check_not_lfs_pointer

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")

OTHER_WEIGHTS = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),  # PyTorch, also training arguments and optimizer states
    *("*.h5", "*.msgpack", "*.ot", "*.tflite"),  # TensorFlow, Flax, Rust
    *("*.gguf*", "*.ggml", "*.onnx*", "*.nemo"),
    *("*.npz", "*.npy"),  # masks, which belong to other weights than those that are written
    *("*.bin.index*.json", "*.h5.index.json", "*.msgpack.index.json", "*.safetensors.index.*.json"),  # the last for variants
    "adapter_config.json",  # without its weights, peft cannot load the directory
)
"""The files of a checkpoint that hold weights in a format that is not read, or belong to such weights."""

NOT_DOWNLOADED = (*OTHER_WEIGHTS, ".*", "*/*.safetensors", "[!a]*/*", "a/*", "a[!d]*/*")
"""The files of a hub repository that are not downloaded: other weights, hidden files, and all files in directories with names that
do not start with "ad". That leaves additional_chat_templates. In the hub's patterns * matches slashes.
"""


def find_source(directory_or_id: str | Path, files: Sequence[str] | None = None) -> Path:
    """The directory of a Hugging Face checkpoint. A directory on disk goes before a hub id.

    For a hub id, downloads the files that match `files` and returns their directory. The default is every file that is read or
    passed on: safetensors weights and what `read_side_files` reads. Raises MaskLLMError if there is no such directory and the hub
    does not provide it either.
    """
    path = Path(directory_or_id)
    if path.exists() and not path.is_dir():
        raise MaskLLMError(f"{path}: is a file; wanted the directory of a Hugging Face checkpoint")
    if not path.exists():
        path = download(str(directory_or_id), "directory", files, NOT_DOWNLOADED)
    if not (path / "config.json").is_file():
        raise MaskLLMError(f"{path / 'config.json'}: no such file; wanted the directory of a Hugging Face checkpoint")
    return path


def download(
    hub_id: str, wanted: str, allow: Sequence[str] | None, ignore: Sequence[str] = (), to: str | Path | None = None
) -> Path:
    """Download a hub repository into the directory `to`, by default the hub's local cache, and return its directory.

    `allow` and `ignore` are the hub's patterns of file names; None allows all. Raises MaskLLMError if `hub_id` cannot be an id, and
    with the reason if the hub does not provide it. The errors say that it is no `wanted` on this machine either.
    """
    try:
        validate_repo_id(hub_id)
    except HFValidationError:
        raise MaskLLMError(f"{hub_id}: no such {wanted}, and not a hub id like gpt2 or OWNER/NAME") from None
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=allow, ignore_patterns=ignore, local_dir=to))
    except GatedRepoError:  # a kind of RepositoryNotFoundError
        reason = f"accept its license on https://huggingface.co/{hub_id} and run `hf auth login`"
    except RepositoryNotFoundError:
        reason = "it has no repository of this name, or a private one; correct the name or run `hf auth login`"
    except LocalEntryNotFoundError as error:
        reason = f"it cannot be reached, and its cache on this machine has no copy ({first_line(error, with_type=False)})"
    except Exception as error:  # the hub's client also raises errors of requests and httpx
        reason = first_line(error, with_type=False)
    raise MaskLLMError(f"{hub_id}: no such {wanted}, and the hub does not give it: {reason}")


def side_files(source: Path) -> list[Path]:
    """The files in `source` that are passed on with every checkpoint made from it: all but weights and hidden files.

    They are the config, the tokenizer in any format, chat templates, licenses, the model card, code. Of subdirectories, only
    additional_chat_templates is passed on: the others hold other formats of the model, or a training's logs.
    """
    files = [file for file in source.iterdir() if not file.name.startswith(".") and file.is_file()]
    files = [file for file in files if not any(fnmatchcase(file.name, pattern) for pattern in WEIGHTS + OTHER_WEIGHTS)]
    return sorted(files) + sorted(source.glob("additional_chat_templates/*.jinja"))


def read_side_files(source: Path) -> dict[Path, bytes]:
    """The contents of the `side_files` of `source`, by path relative to `source`.

    Raises MaskLLMError if config.json is missing, because no checkpoint can be loaded without it, and if a file is a git-lfs
    pointer.
    """
    if not (source / "config.json").is_file():
        raise MaskLLMError(f"{source / 'config.json'}: no such file")
    contents = {}
    for file in side_files(source):
        check_not_lfs_pointer(file)
        contents[file.relative_to(source)] = file.read_bytes()
    return contents


def write_side_files(files: Mapping[Path, bytes], target: Path) -> None:
    """Write what `read_side_files` has read into the directory `target`, which is made if necessary."""
    for place, contents in files.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        (target / place).write_bytes(contents)
