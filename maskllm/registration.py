"""Makes transformers know compressed checkpoints without importing it: `import maskllm` stays quick where it is not used."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"
"""transformers' table of loaders. It is imported with the first model class."""

_LOADER = "maskllm.inference.transformers_quantizer"


class _AfterRegistry(importlib.abc.MetaPathFinder):
    """Imports the loader right after the registry."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(_LOADER)

            spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Register the loader now if transformers' registry is imported, else as soon as it is."""
    if REGISTRY in sys.modules:
        importlib.import_module(_LOADER)
    else:
        sys.meta_path.insert(0, _AfterRegistry())
