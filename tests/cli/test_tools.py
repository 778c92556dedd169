"""The scripts in tools/ do what the verbs do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from maskllm.checkpoints.reading import resolve
from maskllm.cli import main

TOOLS = Path(__file__).parents[2] / "tools"
VERBS = {
    "convert_checkpoint": "convert",
    "evaluate": "evaluate",
    "export_hf": "export",
    "preprocess_data": "preprocess",
    "trim_checkpoint": "trim",
}


def run(script: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of `python tools/SCRIPT.py ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / f"{script}.py"), run_name="__main__")
    return stop.value.code


def test_every_script_has_a_verb():
    assert {path.stem for path in TOOLS.glob("*.py")} == set(VERBS)


@pytest.mark.parametrize("script", VERBS)
def test_a_script_takes_the_options_of_its_verb(script, monkeypatch, capsys):
    assert run(script, monkeypatch, "--help") == 0
    found = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([VERBS[script], "--help"])
    assert found == capsys.readouterr().out != ""


def test_a_script_converts_and_returns_the_verbs_status(tiny_hf, tmp_path, monkeypatch):
    assert run("convert_checkpoint", monkeypatch, "--hf", tiny_hf, "--output", tmp_path / "dense") == 0
    assert resolve(tmp_path / "dense").info.stage == "dense"
    assert run("convert_checkpoint", monkeypatch, "--hf", tmp_path / "nowhere", "--output", tmp_path / "other") == 1
