"""The files of a report."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from maskllm.files import write_json, write_text


def write_report_files(values: dict[str, Any], html: str, directory: str | os.PathLike) -> None:
    """Write `report.json`, which holds `values`, and `report.html` into `directory`."""
    write_json(Path(directory) / "report.json", values)
    write_text(Path(directory) / "report.html", html)


def only_finite(value: Any) -> Any:
    """A JSON value with None for infinities and NaN, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: only_finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [only_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
