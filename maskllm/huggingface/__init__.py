"""Frame 2: masks in any transformers model, and everything about Hugging Face's files.

`sparsify` and `finish` are the way in for a model in memory. They are imported when they are asked for, because transformers' models
take seconds to import and most files here do without them.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("finish", "sparsify"):
        from maskllm.huggingface import sparse_model

        return getattr(sparse_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
