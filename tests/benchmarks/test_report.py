"""The numbers of README and docs are those of the result files, and the tool knows which of them are older than the code."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import registry, report, results
from benchmarks.registry import MEASUREMENTS, TABLES, Measurement, Table
from benchmarks.results import Result
from maskllm.errors import MaskLLMError

ROOT = Path(__file__).parents[2]
RESULT = Result({"seconds": 2.5}, "2026-11-28", "a processor, 2 threads", 0.1, {"torch": "2.13.0"}, "abc", "python -m x", None)


def test_pages_have_the_numbers_of_the_results():
    assert report.check() == [], "run `python -m benchmarks.report render`"


def test_every_measurement_is_in_a_table_and_has_sources():
    shown = Counter(name for table in TABLES.values() for name in table.measurements)
    assert set(shown) == set(MEASUREMENTS)
    for measurement in MEASUREMENTS.values():
        assert [path for path in measurement.sources if not (ROOT / path).exists()] == [], measurement.name


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A repository whose README has one table, of the measurement `speed`."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "OVERVIEW", tmp_path / "docs" / "results.md")
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    speed = Measurement("speed", "python write.py", 1, ("code.py",))
    table = Table("speed", "Speed", ("speed",), lambda found: [f"| {found['speed'].result['seconds']} s |"])
    for module in (report, registry):
        monkeypatch.setattr(module, "MEASUREMENTS", {"speed": speed})
        monkeypatch.setattr(module, "TABLES", {"speed": table})
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- benchmark:speed -->\nold\n<!-- /benchmark:speed -->\n\nText.\n")
    results.write_result("speed", RESULT)
    return readme


def test_render_writes_the_numbers_and_check_finds_others(page):
    assert report.check() == ["README.md", "docs/results.md"]
    report.render()
    text = page.read_text()
    assert (
        "| 2.5 s |\n\nMeasured 2026-11-28 on a processor, 2 threads, with older code; [commit and command](docs/results.md#" in text
    )
    assert text.startswith("# Title\n\n<!-- benchmark:speed -->\n") and text.endswith("<!-- /benchmark:speed -->\n\nText.\n")
    assert report.check() == []
    page.write_text(text.replace("2.5 s", "2.4 s"))
    assert report.check() == ["README.md"]
    page.write_text(text)
    results.write_result("speed", dataclasses.replace(RESULT, result={"seconds": 9.0}))
    assert report.check() == ["README.md", "docs/results.md"]


@pytest.mark.parametrize(
    ("older", "said"),
    [
        ("a", ", with older code for `a`;"),
        ("ab", ", with older code, except `c`;"),
        ("abc", ", with older code;"),
        ("", " 2 threads;"),
    ],
)
def test_a_table_names_the_fewer_of_older_and_current_measurements(older, said):
    table = Table("speed", "Speed", tuple("abc"), lambda found: [])
    assert said in report.table_lines(table, dict.fromkeys("abc", RESULT), older, "")[-1]


def test_a_table_without_results_says_so(page):
    results.result_file("speed").unlink()
    report.render()
    assert "<!-- benchmark:speed -->\nNot measured yet.\n" in page.read_text()
    assert report.check() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- benchmark:gone -->\n<!-- /benchmark:gone -->\n", "benchmark:gone: benchmarks/registry.py has no such table"),
        ("<!-- benchmark:speed -->\n1\n", "a marker alone"),
        ("<!-- benchmark:speed -->\n1\n<!-- /benchmark:sped -->\n", "a marker alone"),
    ],
)
def test_markers_that_are_wrong_are_named(page, text, message):
    page.write_text(text)
    with pytest.raises(MaskLLMError, match=message):
        report.check()


def test_result_files_that_are_wrong_are_named(page):
    stray = results.FOLDER / "quality" / "gone.json"
    stray.parent.mkdir()
    stray.write_text("{}")
    with pytest.raises(MaskLLMError, match=r"gone.json: .* has no measurement quality/gone"):
        report.check()
    stray.unlink()
    results.result_file("speed").write_text('{"seconds": 1}')
    with pytest.raises(MaskLLMError, match=r"speed.json: found the keys seconds; wanted command, commit, "):
        report.check()


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_a_result_is_older_when_its_code_has_changed(page):
    folder = page.parent
    git(folder, "init", "-q")
    (folder / "code.py").write_text("1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    command = report.MEASUREMENTS["speed"].command
    at_one = dataclasses.replace(RESULT, command=command, commit=git(folder, "rev-parse", "HEAD"))

    def older(result: Result) -> bool:
        return results.is_older(result, command, ["code.py"])

    page.write_text("other words")
    git(folder, "commit", "-qam", "documentation")
    assert not older(at_one)
    (folder / "code.py").write_text("2\n")
    assert older(at_one), "local changes count"
    git(folder, "commit", "-qam", "two")
    assert older(at_one)
    at_two = dataclasses.replace(at_one, commit=git(folder, "rev-parse", "HEAD"))
    assert not older(at_two)
    assert older(dataclasses.replace(at_one, commit=git(folder, "rev-parse", "HEAD") + "-dirty"))
    assert older(dataclasses.replace(at_one, commit="0123456789ab")), "git does not know this commit"
    assert older(dataclasses.replace(at_one, commit=None))
    assert results.is_older(at_two, f"{command} --twice", ["code.py"]), "another command"
    results.write_result("speed", at_one)
    page.write_text("")
    report.render()
    assert report.older_in_overview() == {"speed"}
    (folder / "code.py").write_text("1\n")
    assert report.check() == [], "the age on the page is that of the last rendering"
    report.render()
    assert report.older_in_overview() == set()


def test_run_writes_the_result_with_its_circumstances(page, capsys):
    (page.parent / "write.py").write_text(
        "import json, sys, pathlib; pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text(json.dumps({'seconds': 3}))"
    )
    assert report.main(["run", "speed"]) == 0
    written = json.loads(results.result_file("speed").read_text())
    assert written["result"] == {"seconds": 3} and written["command"] == "python write.py"
    assert list(written["versions"]) == ["torch", "megatron-core", "transformers"]
    assert all(written[key] for key in ("date", "machine", "commit")) and written["load"] >= 0
    assert "wrote results/speed.json" in capsys.readouterr().out


def test_a_run_that_cannot_be_made_or_fails_is_named_and_the_others_go_on(page, monkeypatch, capsys):
    (page.parent / "fail.py").write_text("raise SystemExit(3)")
    measurements = [
        Measurement("lacks", "python x.py {quickstart}", 1, ()),
        Measurement("fails", "python fail.py", 5, ()),
        Measurement("there/already", "make quickstart", 6, (), output="README.md"),
        Measurement("there/long", "make quickstart", 11, (), output="README.md"),
    ]
    monkeypatch.setattr(report, "MEASUREMENTS", {one.name: one for one in measurements})
    results.result_file("speed").unlink()
    assert report.main(["run", "--minutes", "10"]) == 1
    output = capsys.readouterr()
    assert "[lacks] left out: needs outputs/quickstart, which make quickstart writes" in output.out
    assert "[fails] failed: fails: exit status 3" in output.err
    assert "[there/already] failed: " in output.err and "README.md: is there already, perhaps from other code" in output.err
    assert "there/long" not in output.out + output.err
    assert [one.name for one in report.selected(["there"])] == ["there/already", "there/long"]
    monkeypatch.setattr(report, "MEASUREMENTS", {"lacks": measurements[0]})
    assert (report.main(["run", "--minutes", "10"]), report.main(["run", "lacks"])) == (0, 1)
    with pytest.raises(MaskLLMError, match="gone: no such measurement"):
        report.main(["run", "gone"])
    with pytest.raises(MaskLLMError, match="wanted the names"):
        report.main(["run"])
