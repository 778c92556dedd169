"""Run a table of sparse fine-tuning: the dense model fine-tuned, and each sparsity recovered with each loss.

    python examples/finetune/table.py t5-multi30k --prepared outputs/finetune --output outputs/tables/t5-multi30k
    python examples/finetune/table.py t5-small-wmt14 --prepared data --output tables/t5 --launch "torchrun --nproc-per-node 8 -m maskllm"

A recipe is a JSON file in `recipes/`, or a path. Its rows run one after the other, each a `maskllm finetune` that writes OUTPUT/ROW.
Repeat the command after an interruption: finished rows are kept, and the row that was running goes on from its last checkpoint.
OUTPUT/table.md has the table of the rows that are finished, OUTPUT/rows.json their numbers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from maskllm.cli import finetune
from maskllm.errors import MaskLLMError, flag
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_json, write_text
from maskllm.finetuning.record import setting_text
from maskllm.finetuning.settings import DECIDE_NOTHING, FinetuneSettings
from maskllm.markdown import markdown_table
from maskllm.processes import end_with_parent, wait_for_child

RECIPES = Path(__file__).parent / "recipes"
DENSE = "dense"
TARGETS = {
    "2-4": {"pattern": "2:4"},
    "1-4": {"pattern": "1:4"},
    "16-64": {"pattern": "16:64"},
    "75": {"sparsity": 0.75},
}
"""The sparsities of a recipe that names none: options of `maskllm finetune`."""
LOSSES = {
    "ce": {"ce-loss-coeff": 1, "squarehead-loss-coeff": 0},
    "ce-kl": {"ce-loss-coeff": 1, "kl-loss-coeff": 1, "squarehead-loss-coeff": 0},
    "ce-squarehead": {"ce-loss-coeff": 1, "squarehead-loss-coeff": 1},
}
"""The losses of a recipe that names none."""
TITLES = {"ce": "CE", "kl": "KL", "squarehead": "SquareHead"}


class Recipe:
    """A file of `recipes/`.

    `options`: options of `maskllm finetune` for all rows; "{prepared}" in a value is the folder of prepared models and data. `dense`:
    those that are others for the dense model. `from_dense`: the sparse rows start from the fine-tuned dense model, which is their
    teacher too. `targets` and `losses`: as TARGETS and LOSSES.
    """

    def __init__(self, name: str, model: str | None = None) -> None:
        """`model`: another one than the recipe's, a directory or a hub id."""
        path = Path(name) if name.endswith(".json") else RECIPES / f"{name}.json"
        if not path.exists():
            raise SystemExit(f"{path}: no such recipe; found {', '.join(sorted(file.stem for file in RECIPES.glob('*.json')))}")
        content = read_json_object(path)
        for key in ("title", "options"):
            if key not in content:
                raise MaskLLMError(f"{path}: has no {key!r}; wanted an object with title and options, such as those in {RECIPES}")
        self.title: str = content["title"]
        self.options: dict[str, Any] = content["options"] | ({"model": model} if model else {})
        self.dense: dict[str, Any] = content.get("dense", {})
        self.from_dense: bool = content.get("from_dense", False)
        self.targets: dict[str, dict[str, Any]] = content.get("targets", TARGETS)
        self.losses: dict[str, dict[str, Any]] = content.get("losses", LOSSES)

    @property
    def rows(self) -> list[str]:
        """All rows' names. The first target's rows come first, the dense row before all others."""
        return [DENSE, *(f"{target}-{loss}" for target in self.targets for loss in self.losses)]

    def arguments(self, row: str, output: Path, prepared: str) -> list[str]:
        """The row's arguments of `maskllm`. Raises SystemExit if there is no such row."""
        options = dict(self.options)
        if row == DENSE:
            options |= {"sparsity": 0} | self.dense
            options.pop("update-weights", None)
        else:
            found = [(t, o) for t in self.targets for o in self.losses if f"{t}-{o}" == row]
            if not found:
                raise SystemExit(f"--row {row}: no such row; found {', '.join(self.rows)}")
            options |= self.targets[found[0][0]] | self.losses[found[0][1]]
            if self.from_dense:
                options["model"] = str(output / DENSE / "model")
        words = ["finetune"]
        for name, value in options.items():
            if value is True:
                words.append(f"--{name}")
            elif value is not None:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name}", *(str(one).replace("{prepared}", prepared) for one in values)]
        return [*words, "--output", str(output / row)]


def settings_of(arguments: list[str]) -> FinetuneSettings:
    """What `maskllm finetune` makes of a row's arguments, with its defaults. Raises SystemExit or MaskLLMError as it does."""
    parser = argparse.ArgumentParser(prog="maskllm finetune", usage="table.py RECIPE [options of maskllm finetune]")
    finetune.add_arguments(parser)
    return finetune.settings(parser.parse_args(arguments[1:])).complete()


def check_rows(recipe: Recipe, output: Path, prepared: str, more: list[str]) -> None:
    """Raise an error if the options of a row cannot be, or if a finished row in `output` had others."""
    for row in recipe.rows:
        wanted = json.loads(json.dumps(asdict(settings_of([*recipe.arguments(row, output, prepared), *more]))))
        if wanted["gradient_accumulation_steps"] is None:  # the report has the number that the run has found
            del wanted["gradient_accumulation_steps"]
        report = finished(output, row)
        found_settings = report["settings"] if report else {}
        for name, value in wanted.items():
            found = found_settings.get(name, value)
            if found != value and name not in ("output", *DECIDE_NOTHING):
                raise MaskLLMError(
                    f"{output / row}: is of {flag(name)} {setting_text(found)}, not {setting_text(value)}; take another --output"
                )


def run_row(command: list[str]) -> bool:
    """Run a row's command; returns whether it has ended well. It ends with this process, which waits for it after an interruption."""
    end = functools.partial(end_with_parent, os.getpid(), signal.SIGTERM)
    process = subprocess.Popen(command, preexec_fn=end)
    return wait_for_child(process.wait, process.terminate) == 0


def finished(output: Path, row: str) -> dict[str, Any] | None:
    """What a finished row found; None if it has not finished."""
    path = output / row / "report.json"
    if not path.exists():
        return None
    report = read_json_object(path)
    kept = ("measure", "higher_is_better", "dense", "one_shot", "trained", "seconds", "command", "commit", "machine", "settings")
    date = time.strftime("%Y-%m-%d", time.gmtime(path.stat().st_mtime))
    return {"row": row, "date": date} | {key: report[key] for key in kept if key in report}


def share(value: float, measure: str) -> str:
    """A measure as the table shows it: error rates in percent."""
    return f"{100 * value:.2f} %" if measure in ("wer", "cer") else f"{value:.2f}"


def table(recipe: Recipe, rows: dict[str, dict[str, Any]]) -> list[str]:
    """The Markdown table of finished rows: a line for each sparsity, a column for each loss."""
    if not rows:
        return ["No row has finished."]
    any_row = next(iter(rows.values()))
    measure, higher = any_row["measure"], any_row["higher_is_better"]
    tuned = rows[DENSE]["trained"][measure] if DENSE in rows else None

    def cell(row: str, key: str) -> str:
        return share(rows[row][key][measure], measure) if row in rows else ""

    lines = []
    for target, options in recipe.targets.items():
        mine = [row for row in (f"{target}-{loss}" for loss in recipe.losses) if row in rows]
        best = ""
        if mine and tuned:
            found = (max if higher else min)(rows[row]["trained"][measure] for row in mine)
            best = f"{100 * (found / tuned - 1):+.1f} %"
        zeros = options.get("pattern") or f"{100 * options['sparsity']:g} %" if "sparsity-schedule" not in options else target
        one_shot = cell(mine[0], "one_shot") if mine else ""
        lines.append([str(zeros), one_shot, *(cell(f"{target}-{loss}", "trained") for loss in recipe.losses), best])
    titles = [" + ".join(TITLES[term] for term in loss.split("-")) for loss in recipe.losses]
    text = markdown_table(["sparsity", "one-shot", *titles, "best, to dense fine-tuned"], lines, left=1)
    if DENSE in rows:
        dense = rows[DENSE]
        before, after = (share(dense[key][measure], measure) for key in ("dense", "trained"))
        text += ["", f"Dense: {before} as it is, {after} fine-tuned."]
    better = "higher" if higher else "lower"
    return [*text, "", f"Measure: {measure}, {better} is better."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file in recipes/ without .json, or a path")
    parser.add_argument("--prepared", default="outputs/finetune", help="folder that the recipe's files are in")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="another model than the recipe's, directory or hub id")
    parser.add_argument("--row", nargs="+", help="run these rows only, and the dense one if they start from it; default: all")
    parser.add_argument("--launch", default=f"{sys.executable} -m maskllm", help="what starts maskllm, for example under torchrun")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--json", type=Path, help="write the numbers of the rows of --row to this file too")
    args, more = parser.parse_known_args()
    recipe = Recipe(args.recipe, args.model)
    rows, failed = args.row or recipe.rows, []
    if recipe.from_dense and DENSE not in rows:
        rows = [DENSE, *rows]
    check_rows(recipe, args.output, args.prepared, more)
    for row in rows:
        command = [*shlex.split(args.launch), *recipe.arguments(row, args.output, args.prepared), *more]
        if args.dry_run:
            print(shlex.join(command))
            continue
        if finished(args.output, row) is None:
            print(f"[{row}] {shlex.join(command)}", flush=True)
            if not run_row(command):
                failed.append(row)
        all_rows = {name: found for name in recipe.rows if (found := finished(args.output, name)) is not None}
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "rows.json", {"rows": list(all_rows.values())})
        write_text(args.output / "table.md", "\n".join([f"# {recipe.title}", "", *table(recipe, all_rows)]) + "\n")
        if recipe.from_dense and DENSE in failed:
            break
    if args.dry_run:
        return 0
    print((args.output / "table.md").read_text(encoding="utf-8"))
    if args.json:
        write_json(args.json, {"rows": [found for row in args.row or rows if (found := finished(args.output, row))]})
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(run_guarded("table.py", main))
