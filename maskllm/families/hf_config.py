"""Reading a Hugging Face `config.json` as plain data, with errors that name the key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maskllm.errors import MaskLLMError

_REQUIRED = object()


@dataclass(frozen=True)
class HFConfig:
    """The values of a `config.json` or of a section in it. A key with the value null counts as absent."""

    values: dict[str, Any]
    source: str
    """The file, and the section in it, that errors name."""

    def error(self, message: str) -> MaskLLMError:
        """An error about this config."""
        return MaskLLMError(f"{self.source}: {message}")

    def has(self, key: str) -> bool:
        """Whether `key` is present."""
        return self.values.get(key) is not None

    def _get(self, key: str, kinds: tuple[type, ...], wanted: str, default: Any) -> Any:
        if not self.has(key):
            if default is _REQUIRED:
                raise self.error(f"{key} is missing; wanted {wanted}")
            return default
        value = self.values[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(f"{key} is {value!r}; wanted {wanted}")
        return value

    def integer(self, key: str, *, default: Any = _REQUIRED) -> int:
        """A positive integer. Raises MaskLLMError if it is anything else, or if it is absent and has no default."""
        value = self._get(key, (int,), "a positive integer", default)
        if value <= 0:
            raise self.error(f"{key} is {value}; wanted a positive integer")
        return value

    def number(self, key: str, *, default: Any = _REQUIRED) -> float:
        """A positive number. Raises MaskLLMError if it is anything else, or if it is absent and has no default."""
        value = self._get(key, (int, float), "a positive number", default)
        if not 0 < value < float("inf"):
            raise self.error(f"{key} is {value}; wanted a positive number")
        return float(value)

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false. Raises MaskLLMError if it is anything else."""
        return self._get(key, (bool,), "true or false", default)

    def nullable(self, read: Callable[[str], Any], key: str, *, default: Any) -> Any:
        """`read(key)`, but None if the key has the value null. `default` only if the key is not there at all."""
        if key not in self.values:
            return default
        return read(key) if self.has(key) else None

    def section(self, key: str) -> HFConfig:
        """A JSON object inside this one. Raises MaskLLMError if it is absent or anything else."""
        return HFConfig(self._get(key, (dict,), "a JSON object", _REQUIRED), f"{self.source}: {key}")

    def require(self, key: str, wanted: Any, *, default: Any) -> None:
        """Raise MaskLLMError if `key`, or `default` if it is absent, has another value than `wanted`."""
        value = self._get(key, (object, bool), repr(wanted), default)
        if value != wanted:
            raise self.error(f"{key} {value!r} is not supported, only {wanted!r}")
