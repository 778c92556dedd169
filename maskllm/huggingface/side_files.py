"""The files of a Hugging Face checkpoint that are not weights."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from maskllm.errors import MaskLLMError
from maskllm.files import check_not_lfs_pointer

HASH_FILE = "weights_sha256.json"
"""What `maskllm export` and `maskllm finetune` write beside the weights: their hash (`maskllm.huggingface.weights_hash`)."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", HASH_FILE)

OTHER_WEIGHTS = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),  # PyTorch, also training arguments and optimizer states
    *("*.h5", "*.msgpack", "*.ot", "*.tflite"),  # TensorFlow, Flax, Rust
    *("*.gguf*", "*.ggml", "*.onnx*", "*.nemo"),
    *("*.npz", "*.npy"),  # masks, which belong to other weights than those that are written
    *("*.bin.index*.json", "*.h5.index.json", "*.msgpack.index.json", "*.safetensors.index.*.json"),  # the last for variants
    "adapter_config.json",  # without its weights, peft cannot load the directory
)
"""The files of a checkpoint that hold weights in a format that is not read, or belong to such weights."""


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
