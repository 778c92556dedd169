"""The measurements and the numbers in README and docs.

    python -m benchmarks.report list [NAME...]        what can be measured, and how old the results are
    python -m benchmarks.report run NAME...           measure: writes docs/benchmarks/results/NAME.json
    python -m benchmarks.report render                write docs/results.md, and the tables between markers in README and docs
    python -m benchmarks.report check                 exit with 1 if a page's tables differ from the results

NAME is a measurement, or what stands before the slash in the names of several. Pages hold tables between `<!-- benchmark:TABLE -->` and
`<!-- /benchmark:TABLE -->`. benchmarks/registry.py lists measurements and tables.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from benchmarks.registry import MEASUREMENTS, TABLES, Measurement, Table
from benchmarks.results import FOLDER, ROOT, Result, is_older, load_average, new_result, read_result, result_file, write_result
from benchmarks.tables import measurement_rows
from maskllm.environment.revision import commit
from maskllm.errors import MaskLLMError
from maskllm.failures import run_guarded
from maskllm.files import read_json_object, write_text
from maskllm.processes import end_with_parent

OVERVIEW = ROOT / "docs" / "results.md"
MARKERS = re.compile(r"<!-- benchmark:(?P<name>[\w/-]+) -->\n(?P<lines>.*?)<!-- /benchmark:(?P=name) -->", re.DOTALL)
ANY_MARKER = re.compile(r"<!-- /?benchmark:")
OLDER = "older"
"""What the table of measurements says of code that has changed."""


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path != OVERVIEW)]


def results() -> dict[str, Result]:
    """All results, by measurement. Raises MaskLLMError for a file that belongs to no measurement."""
    for file in FOLDER.rglob("*.json"):
        name = str(file.relative_to(FOLDER).with_suffix("").as_posix())
        if name not in MEASUREMENTS:
            raise MaskLLMError(f"{file}: benchmarks/registry.py has no measurement {name}; add one, or remove the file")
    return {name: result for name in MEASUREMENTS if (result := read_result(name)) is not None}


def older_results(found: dict[str, Result]) -> set[str]:
    """The measurements whose code or command has changed since."""
    known = {name: MEASUREMENTS[name] for name in found}
    return {name for name, one in known.items() if is_older(found[name], one.command, one.sources)}


def older_in_overview() -> set[str]:
    """The measurements that docs/results.md says are older."""
    text = OVERVIEW.read_text(encoding="utf-8") if OVERVIEW.exists() else ""
    return set(re.findall(rf"^\| `([^`]+)` .*\| {OLDER} +\| ", text, re.MULTILINE))


def table_lines(table: Table, found: dict[str, Result], older: Collection[str], overview: str) -> list[str]:
    """The Markdown of a table; `overview` is the link to docs/results.md, or empty on that page itself."""
    mine = {name: found[name] for name in table.measurements if name in found}
    if not mine:
        return ["Not measured yet."]
    machines = " and ".join(dict.fromkeys(result.machine or "an unknown machine" for result in mine.values()))
    dates = sorted({result.date for result in mine.values() if result.date})
    when = f" {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "") if dates else ""
    aged = [name for name in mine if name in older]
    current = [name for name in mine if name not in older]
    code = f", with {OLDER} code" if aged else ""
    if aged and current:  # The shorter list says as much.
        word, named = (" for", aged) if len(aged) <= len(current) else (", except", current)
        code += f"{word} {', '.join(f'`{name}`' for name in named)}"
    return [*table.render(mine), "", f"{table.made}{when} on {machines}{code}; [commit and command]({overview}#measurements)."]


def rendered(page: Path, text: str, found: dict[str, Result], older: Collection[str]) -> str:
    """The text of a page with the tables of these results. Raises MaskLLMError for a marker that is not one of a pair, or unknown."""
    overview = os.path.relpath(OVERVIEW, page.parent)

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise MaskLLMError(f"{page}: benchmark:{name}: benchmarks/registry.py has no such table")
        lines = "\n".join(table_lines(TABLES[name], found, older, overview))
        return f"<!-- benchmark:{name} -->\n{lines}\n<!-- /benchmark:{name} -->"

    if len(ANY_MARKER.findall(text)) != 2 * len(MARKERS.findall(text)):
        raise MaskLLMError(f"{page}: found a marker alone; wanted `<!-- benchmark:NAME -->`, lines, and `<!-- /benchmark:NAME -->`")
    return MARKERS.sub(replace, text)


def overview_text(found: dict[str, Result], older: Collection[str]) -> str:
    """The page docs/results.md."""
    lines = [
        "# Results",
        "",
        "`python -m benchmarks.report render` writes this page from the files in `docs/benchmarks/results`.",
        "[CONTRIBUTING.md](../CONTRIBUTING.md) says how to measure again, and how to add a number.",
    ]
    for table in TABLES.values():
        lines += ["", f"## {table.title}", "", *table_lines(table, found, older, "")]
    lines += [
        "",
        "## Measurements",
        "",
        "`python -m benchmarks.report run NAME` repeats one.",
        f"Code is `{OLDER}` if what a measurement depends on, or its command, differed from that of its commit when this page was "
        "rendered, or if the commit is unknown.",
        "Load is the number of programs that were running when it began.",
        "In a command, `{data}` is the folder of real test data, `{quickstart}` what `make quickstart` has written, `{dense}` the dense "
        "model in it, `{finetune}` what `examples/finetune/prepare.sh` has written, and `{work}` a folder for its group.",
        "",
        *measurement_rows([_row(name, result, name in older) for name, result in found.items()]),
    ]
    missed = [name for name in MEASUREMENTS if name not in found]
    of_group = Counter(name.partition("/")[0] for name in missed)
    if missed:
        shown = dict.fromkeys(f"{group}/..." if of_group[group := name.partition("/")[0]] > 3 else name for name in missed)
        lines += ["", f"Not measured yet: {', '.join(f'`{name}`' for name in shown)}."]
    return "\n".join(lines) + "\n"


def _row(name: str, result: Result, older: bool) -> list[str]:
    versions = ", ".join(f"{package} {version}" for package, version in result.versions.items() if version)
    told = [f"`{result.command}`" if result.command else "", result.note or ""]
    return [
        f"`{name}`",
        result.date or "",
        result.machine or "",
        "" if result.load is None else f"{result.load:g}",
        versions,
        result.commit or "",
        OLDER if older else "the same",
        "; ".join(filter(None, told)),
    ]


def render() -> None:
    """Write the tables of all pages."""
    found = results()
    older = older_results(found)
    texts = {page: rendered(page, page.read_text(encoding="utf-8"), found, older) for page in pages()}
    texts[OVERVIEW] = overview_text(found, older)
    for page, text in texts.items():
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            write_text(page, text)
            print(f"wrote {page.relative_to(ROOT)}")


def check() -> list[str]:
    """The pages whose tables differ from the results. What docs/results.md says of their age is taken as it is."""
    found, older = results(), older_in_overview()
    different = [page for page in pages() if rendered(page, text := page.read_text(encoding="utf-8"), found, older) != text]
    if not OVERVIEW.exists() or OVERVIEW.read_text(encoding="utf-8") != overview_text(found, older):
        different.append(OVERVIEW)
    return [str(page.relative_to(ROOT)) for page in different]


def selected(names: Iterable[str], minutes: float | None = None) -> list[Measurement]:
    """The measurements of these names or groups, all without names, that need at most so many minutes."""
    chosen = []
    for name in names or MEASUREMENTS:
        group = [one for one in MEASUREMENTS.values() if name in (one.name, one.name.partition("/")[0])]
        if not group:
            raise MaskLLMError(f"{name}: no such measurement; `python -m benchmarks.report list` prints all")
        chosen += [one for one in group if one not in chosen and (minutes is None or one.minutes <= minutes)]
    return chosen


def folders(name: str) -> dict[str, str]:
    """What stands in the braces of a command, as paths from the repository's root."""
    data = Path(os.environ.get("MASKLLM_TEST_DATA", ROOT.parent / "shared" / "data"))
    return {
        "data": os.path.relpath(data, ROOT),
        "quickstart": "outputs/quickstart",
        "dense": "outputs/quickstart/hf/dense",
        "finetune": "outputs/finetune",
        "work": f"outputs/benchmarks/{commit()}/{name.partition('/')[0]}",
    }


def missing(one: Measurement) -> str | None:
    """What the measurement needs and this machine lacks."""
    if one.cuda:
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA GPU"
    for key, path in folders(one.name).items():
        if key != "work" and f"{{{key}}}" in one.command and not (ROOT / path).exists():
            makers = {"data": "MASKLLM_TEST_DATA names", "finetune": "examples/finetune/prepare.sh writes"}
            return f"needs {path}, which {makers.get(key, 'make quickstart writes')}"
    return None


def run(one: Measurement) -> None:
    """Run the command and write its result. Raises MaskLLMError if it fails."""
    places = folders(one.name)
    work = ROOT / places["work"]
    work.mkdir(parents=True, exist_ok=True)
    words = [word.format(**places) for word in shlex.split(one.command)]
    if one.output is None:
        output = work / "result.json"
        words += ["--json", str(output)]
    else:
        output = ROOT / one.output.format(**places)
        if output.exists():
            raise MaskLLMError(f"{output}: is there already, perhaps from other code; remove {output.parent}, and run again")
    words = [sys.executable if word == "python" else word for word in words]
    load, revision = load_average(), commit()
    print(f"[{one.name}] {shlex.join(words)}", flush=True)
    ends = functools.partial(end_with_parent, os.getpid(), signal.SIGTERM)
    if status := subprocess.run(words, cwd=ROOT, check=False, preexec_fn=ends).returncode:
        raise MaskLLMError(f"{one.name}: exit status {status}")
    write_result(one.name, new_result(read_json_object(output), one.command, load, revision))
    print(f"[{one.name}] wrote {result_file(one.name).relative_to(ROOT)}", flush=True)


def run_all(chosen: list[Measurement], *, asked: bool) -> int:
    """Run the measurements. Those that this machine cannot run, and those that fail, are named, and the others go on.

    Returns the exit status: 1 if one failed, or if one that was asked for by name cannot run.
    """
    status = 0
    for one in chosen:
        if lacks := missing(one):
            print(f"[{one.name}] left out: {lacks}", flush=True)
            status = 1 if asked else status
            continue
        try:
            run(one)
        except MaskLLMError as error:
            print(f"[{one.name}] failed: {error}", file=sys.stderr, flush=True)
            status = 1
    return status


def list_lines(chosen: list[Measurement]) -> list[str]:
    """One line for each measurement: name, date, age, minutes, machine."""
    found = results()
    older = older_results(found)
    lines = [f"{'measurement':40} {'date':10} {'code':8} {'minutes':>7} machine"]
    for one in chosen:
        result = found.get(one.name)
        age = "" if result is None else OLDER if one.name in older else "same"
        date, machine = (result.date or "", result.machine or "") if result else ("", "not measured")
        lines.append(f"{one.name:40} {date:10} {age:8} {one.minutes:7g} {machine}")
    return lines


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("list", "run"):
        verb = verbs.add_parser(name)
        verb.add_argument("names", nargs="*", metavar="NAME", help="a measurement, or a group of them; default: all")
        verb.add_argument("--minutes", type=float, metavar="M", help="only those that are expected to need at most M minutes")
    verbs.add_parser("render")
    verbs.add_parser("check")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    arguments = parse_arguments(argv)
    if arguments.verb == "render":
        render()
    elif arguments.verb == "check":
        if different := check():
            raise MaskLLMError(
                f"{', '.join(different)}: other tables than the results give; run `python -m benchmarks.report render`"
            )
    else:
        chosen = selected(arguments.names, arguments.minutes)
        if arguments.verb == "run":
            if not arguments.names and arguments.minutes is None:
                raise MaskLLMError("run: wanted the names of measurements, or --minutes")
            return run_all(chosen, asked=bool(arguments.names))
        print("\n".join(list_lines(chosen)))
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded("report", main))
