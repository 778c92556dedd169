"""Names of Hugging Face checkpoints: directories on disk, or ids on the hub, which are downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from maskllm.errors import MaskLLMError, first_line
from maskllm.huggingface.side_files import OTHER_WEIGHTS

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
