"""What the command lines share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from maskllm.errors import MaskLLMError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something, as they would be typed: not those of switches, and not the absence of one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def refuse_empty(options: Mapping[str, Any]) -> None:
    """Raise MaskLLMError for an option (name with underscores -> value) whose value, or one of them, is the empty string.

    It is what a shell's unset variable leaves, and as a path it would mean the working directory.
    """
    for name, value in options.items():
        if value == "" or (isinstance(value, list) and "" in value):
            raise MaskLLMError(f"--{name.replace('_', '-')}: found an empty value; give it one, or leave the option out")
