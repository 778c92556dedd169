"""The tables of examples/finetune as measurements: one for each row of a recipe."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from benchmarks.results import ROOT, Result
from maskllm.reporting.formatting import format_seconds

_FOLDER = "examples/finetune"
_SCRIPT = ROOT / _FOLDER / "table.py"
_SPEC = importlib.util.spec_from_file_location("finetune_table", _SCRIPT)
table = importlib.util.module_from_spec(_SPEC)
"""The script examples/finetune/table.py."""
_SPEC.loader.exec_module(table)

MAKERS = {
    "whisper-digits": (f"{_FOLDER}/spoken_digits.py", f"{_FOLDER}/whisper_from_ctranslate2.py"),
    "t5-multi30k": (f"{_FOLDER}/train_t5.py",),
    "mpt-documentation": (f"{_FOLDER}/train_mpt.py", "maskllm/quickstart/corpus.py"),
}
"""The recipes that a CPU can run, and what makes their models and data, besides prepare.sh."""
RECIPES = {name: table.Recipe(name) for name in MAKERS}


def command(recipe: str, row: str) -> str:
    """What measures a row; `{finetune}` stands for the folder of prepared models."""
    return f"python examples/finetune/table.py {recipe} --prepared {{finetune}} --output {{work}} --row {row}"


def sources(recipe: str) -> list[str]:
    """The files that decide a row's numbers, besides maskllm itself and the script."""
    return [f"{_FOLDER}/recipes/{recipe}.json", f"{_FOLDER}/prepare.sh", *MAKERS[recipe]]


def render(recipe: str, found: Mapping[str, Result]) -> list[str]:
    """The Markdown table of a recipe from results by `RECIPE/ROW`, commands that made rows and the time of a row."""
    rows = {row["row"]: row for result in found.values() for row in result.result["rows"]}
    commands = [f"* {name}: `{_shown(recipe, row['command'])}`" for name, row in list(rows.items())[:2]]
    seconds = sorted(row["seconds"] for row in rows.values())
    times = " to ".join(format_seconds(one) for one in dict.fromkeys((seconds[0], seconds[-1])))
    return [
        *table.table(RECIPES[recipe], rows),
        "",
        f"A row took {times}, with pruning and measuring. The settings, by the commands of the first rows:",
        "",
        *commands,
    ]


def _shown(recipe: str, command: str) -> str:
    """A row's command without its output, and with the folder of the table that the pages name."""
    shown, _, output = command.partition(" --output ")
    return shown.replace(output.rpartition("/")[0], f"outputs/tables/{recipe}")
