"""What a patch is."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One patch: what it does, where, and the upstream text that makes it necessary."""

    function: Callable[[], None]
    upstream: str
    """Dotted module, or module:Symbol."""
    needed_for: str
    """Text in the upstream source without which this patch has no purpose."""


def upstream_object(upstream: str) -> Any:
    """The module or, for "module:Class.attribute", the object that a patch's `upstream` names."""
    module, _, symbol = upstream.partition(":")
    found = importlib.import_module(module)
    for part in filter(None, symbol.split(".")):
        found = inspect.getattr_static(found, part)
    return found
