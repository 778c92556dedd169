"""Write a `release` checkpoint in a single process, from tensors that are made one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from maskllm.checkpoints.checksums import write_manifest
from maskllm.checkpoints.finding import LATEST, iteration_name, iteration_number
from maskllm.checkpoints.info import INFO, CheckpointInfo, read_info, write_info
from maskllm.checkpoints.torch_dist import LazyTensor, write_tensors
from maskllm.errors import MaskLLMError
from maskllm.files import atomic_directory, write_text
from maskllm.huggingface.side_files import read_side_files, write_side_files


def write_checkpoint(
    root: str | Path, tensors: Mapping[str, LazyTensor], info: CheckpointInfo, *, hf_files_from: Path, description: str
) -> Path:
    """Write `ROOT/release` and return that directory. It appears, and replaces an older one, when it is complete.

    The `side_files` of the Hugging Face directory `hf_files_from` are copied. `description` labels the progress bar. Raises
    MaskLLMError as `release_directory` and `read_side_files` do, before anything is written.
    """
    path = release_directory(root, info.stage)
    hf_files = read_side_files(hf_files_from)
    with atomic_directory(path) as temporary:
        write_tensors(temporary, tensors, description)
        write_metadata(temporary, info, hf_files)
        write_manifest(temporary)
    write_text(path.parent / LATEST, "release\n")
    return path


def release_directory(root: str | Path, stage: str) -> Path:
    """`ROOT/release`, which `write_checkpoint` will create, or replace if it holds a checkpoint of the same stage.

    Raises MaskLLMError if ROOT is a file or holds a training run, or if ROOT/release is anything but a checkpoint of this stage.
    """
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise MaskLLMError(f"{root}: is a file, wanted a directory to make; name another --output")
    if root.exists() and any(iteration_number(entry) is not None for entry in root.iterdir()):
        raise MaskLLMError(f"{root}: holds the checkpoints of a run; name another --output")
    path = root / iteration_name("release")
    if path.exists() and not (path / INFO).is_file():
        raise MaskLLMError(f"{path}: exists and is not a checkpoint of this program; remove it or name another --output")
    if path.exists() and (found := read_info(path).stage) != stage:
        raise MaskLLMError(
            f"{path}: is a {found} checkpoint, not to be replaced by a {stage} one; remove it or name another --output"
        )
    return path


def write_metadata(directory: Path, info: CheckpointInfo, hf_files: Mapping[Path, bytes]) -> None:
    """Write everything of a checkpoint except its tensors and its manifest into `directory`."""
    write_side_files(hf_files, directory / "hf")
    write_info(directory, info)
