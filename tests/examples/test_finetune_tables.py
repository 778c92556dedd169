"""examples/finetune/table.py: its recipes are commands that `maskllm finetune` takes, and its table shows what the reports say."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from benchmarks.registry import TABLES
from benchmarks.results import Result
from maskllm.cli import finetune
from maskllm.errors import MaskLLMError
from maskllm.finetuning.settings import FinetuneSettings
from maskllm.processes import is_gone
from tests.examples.scripts import EXAMPLES, script
from tests.ranks import heed_interrupts

RECIPES = sorted(path.stem for path in (EXAMPLES / "finetune" / "recipes").glob("*.json"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_is_a_valid_command(name, tmp_path):
    recipe = script("table").Recipe(name)
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    assert recipe.rows[0] == "dense"
    for row in recipe.rows:
        verb, *arguments = recipe.arguments(row, tmp_path, "prepared")
        assert verb == "finetune"
        args = parser.parse_args(arguments)
        values = {entry.name: getattr(args, entry.name) for entry in fields(FinetuneSettings)}
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if value is not None}
        settings = FinetuneSettings(**values).complete()
        assert settings.output == str(tmp_path / row)
        assert settings.is_dense == (row == "dense")
        assert (settings.squarehead_loss_coeff > 0) == ("squarehead" in row)
        assert (settings.kl_loss_coeff > 0) == ("kl" in row)
        assert settings.model == str(tmp_path / "dense" / "model") or not (recipe.from_dense and row != "dense")


WAITS = """
import os, signal, time
from pathlib import Path

def stop(*_):
    time.sleep(1)
    Path("ended").touch()
    os._exit(1)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
Path("written").write_text(str(os.getpid()))
Path("written").rename("pid")
time.sleep(60)
"""


def wait_for(file):
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


PROGRAM = """
import json, sys, pathlib
words = sys.argv[1:]
output = pathlib.Path(words[words.index("--output") + 1])
with open(output.parent.parent / "calls.txt", "a") as file:
    file.write(output.name + "\\n")
if (output.parent.parent / "fail").exists():
    sys.exit(3)
zeros = 0.0 if "--sparsity" in words and words[words.index("--sparsity") + 1] == "0" else 0.5
value = 30.0 if zeros == 0 else 29.7 if "--kl-loss-coeff" in words else 28.5
report = {"measure": "bleu", "higher_is_better": True, "dense": {"bleu": 29.0}, "trained": {"bleu": value}, "seconds": 4.0}
report["command"] = " ".join(["maskllm", *words])
report["settings"] = {name: words[words.index("--" + name) + 1] for name in ("model", "task")}
report["settings"]["learning_rate"] = float(words[-words[::-1].index("--learning-rate")])  # the last one counts
if zeros:
    report["one_shot"] = {"bleu": 11.25}
output.mkdir(parents=True)
(output / "report.json").write_text(json.dumps(report))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(*arguments: str, recipe: str = "t5-multi30k") -> int:
        launch = f"{sys.executable} {tmp_path / 'program.py'}"
        table = ["table.py", recipe, "--output", str(tmp_path / "out"), "--launch", launch, *arguments]
        monkeypatch.setattr("sys.argv", table)
        return script("table").main()

    return run


def test_a_table_of_finished_rows(run, tmp_path):
    assert run("--row", "dense", "2-4-ce", "2-4-ce-kl", "--json", str(tmp_path / "row.json")) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 2:4"))
    assert re.findall(r"[-+\d.:]+", row) == ["2:4", "11.25", "28.50", "29.70", "-1.0"]
    assert "Dense: 29.00 as it is, 30.00 fine-tuned." in text
    rows = json.loads((tmp_path / "row.json").read_text())["rows"]
    assert [(one["row"], one["trained"]["bleu"]) for one in rows] == [("dense", 30.0), ("2-4-ce", 28.5), ("2-4-ce-kl", 29.7)]


def test_the_results_page_has_the_same_table(run, tmp_path):
    found = {}
    for row in ("dense", "2-4-ce", "2-4-ce-kl"):
        assert run("--row", row, "--json", str(tmp_path / "row.json")) == 0
        content = json.loads((tmp_path / "row.json").read_text())
        assert [one["row"] for one in content["rows"]] == [row]
        found[f"t5-multi30k/{row}"] = Result(content, None, None, None, {}, None, None, None)
    lines = TABLES["t5-multi30k"].render(found)
    text = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    assert lines[: len(text)] == text
    settings = "\n".join(lines[len(text) :])
    assert "A row took 4.00 s" in settings
    assert "* 2-4-ce: `maskllm finetune --model outputs/finetune/t5 " in settings
    assert "--output" not in settings


def test_rows_from_the_dense_model_train_it_first(run, tmp_path):
    recipe = json.loads((EXAMPLES / "finetune" / "recipes" / "t5-multi30k.json").read_text()) | {"from_dense": True}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert run("--row", "2-4-ce", recipe=str(tmp_path / "recipe.json")) == 0
    assert (tmp_path / "calls.txt").read_text().split() == ["dense", "2-4-ce"]


def test_another_model_is_that_of_the_dense_row_and_the_sparse_rows_start_from_it(run, tmp_path):
    """The sparse rows of this recipe start from the fine-tuned dense model, which is their teacher too."""
    assert run("--model", "other/whisper", "--row", "2-4-ce", recipe="whisper-digits") == 0
    models = {
        row: json.loads((tmp_path / "out" / row / "report.json").read_text())["settings"]["model"] for row in ("dense", "2-4-ce")
    }
    assert models == {"dense": "other/whisper", "2-4-ce": str(tmp_path / "out" / "dense" / "model")}
    with pytest.raises(
        MaskLLMError, match=r"out/dense: is of --model other/whisper, not outputs/finetune/whisper; take another --output"
    ):
        run("--row", "2-4-ce", recipe="whisper-digits")


def test_finished_rows_are_kept_and_failed_ones_are_named(run, tmp_path, capsys):
    assert run("--row", "dense") == 0
    (tmp_path / "fail").touch()
    assert run("--row", "dense", "75-ce", "2-4-ce") == 1
    assert "failed: 75-ce, 2-4-ce" in capsys.readouterr().err
    (tmp_path / "fail").unlink()
    assert run("--row", "75-ce") == 0
    assert (tmp_path / "calls.txt").read_text().split() == ["dense", "75-ce", "2-4-ce", "75-ce"]
    assert "75 %" in (tmp_path / "out" / "table.md").read_text()


def test_without_the_dense_row_no_row_that_starts_from_it_runs(run, tmp_path, capsys):
    (tmp_path / "fail").touch()
    assert run("--row", "2-4-ce", recipe="whisper-digits") == 1
    shown = capsys.readouterr()
    assert "No row has finished." in shown.out and "failed: dense" in shown.err
    assert (tmp_path / "calls.txt").read_text().split() == ["dense"]


def test_finished_rows_of_other_options_are_not_taken_for_those_of_these(run):
    assert run("--row", "dense", "--learning-rate", "5e-4", "--logging-steps", "1") == 0
    assert run("--row", "dense", "--learning-rate", "5e-4") == 0
    with pytest.raises(MaskLLMError, match=r"out/dense: is of --learning-rate 0\.0005, not 0\.001; take another --output"):
        run("--row", "2-4-ce")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_row_ends_with_the_table(number, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WAITS)
    command = [sys.executable, str(EXAMPLES / "finetune" / "table.py"), "t5-multi30k", "--row", "2-4-ce", "--output", "out"]
    with (tmp_path / "console").open("w") as console:
        table = subprocess.Popen(
            [*command, "--launch", f"{sys.executable} {program}"],
            cwd=tmp_path, stdout=console, stderr=console, preexec_fn=heed_interrupts, start_new_session=True,
        )  # fmt: skip
    wait_for(tmp_path / "pid")
    row = int((tmp_path / "pid").read_text())
    if number == signal.SIGINT:  # as a terminal does it
        os.killpg(table.pid, number)
    else:
        table.send_signal(number)
    assert table.wait(60) == {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number]
    if number == signal.SIGKILL:
        wait_for(tmp_path / "ended")
    assert (tmp_path / "ended").exists(), "the table did not wait for its row"
    assert is_gone(row) or number == signal.SIGKILL


def test_unknown_names_are_told(run):
    with pytest.raises(SystemExit, match="--row 3-4-ce: no such row; found dense, 2-4-ce"):
        run("--row", "3-4-ce", "--dry-run")
    with pytest.raises(SystemExit, match=r"nothing\.json: no such recipe; found .*whisper-digits"):
        script("table").Recipe("nothing")
