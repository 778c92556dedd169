"""Steps of a pipeline: which are repeated, which resume, and what a signal does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from maskllm.errors import MaskLLMError
from maskllm.quickstart.steps import Steps


def command(code: str) -> list[object]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("can_resume", [False, True])
def test_an_interrupted_step_keeps_its_output_only_if_it_can_resume(can_resume, tmp_path):
    output = tmp_path / "out"
    # The first run makes the output and fails. The second run records whether the output was still there.
    code = f"from pathlib import Path; p = Path({str(output)!r}); found = p.exists(); p.mkdir(exist_ok=True)\n"
    code += f"q = Path({str(tmp_path / 'log')!r}); again = q.exists(); q.write_text(str(found)); raise SystemExit(not again)"
    with pytest.raises(MaskLLMError, match="step one ended with exit status 1"):
        Steps(tmp_path).run("one", output, command(code), can_resume=can_resume)
    Steps(tmp_path).run("one", output, command(code), can_resume=can_resume)
    assert (tmp_path / "log").read_text() == str(can_resume)
    assert json.loads((tmp_path / "steps.json").read_text())["one"]["told"] == ["-c", code]
    (tmp_path / "log").unlink()
    Steps(tmp_path).run("one", output, command(code), can_resume=can_resume)
    assert not (tmp_path / "log").exists(), "a finished step ran again"


def test_sigterm_reaches_the_step_and_the_pipeline_ends_after_it(tmp_path):
    ready, saved = tmp_path / "ready", tmp_path / "saved"
    step = f"""
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(0.2)
    Path({str(saved)!r}).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
Path({str(ready)!r}).touch()
time.sleep(60)
"""
    pipeline = f"""
import sys
from pathlib import Path
from maskllm.failures import run_guarded
from maskllm.quickstart.steps import Steps
folder = Path({str(tmp_path)!r})
sys.exit(run_guarded("pipeline", lambda: Steps(folder).run("one", folder / "out", [sys.executable, "-c", {step!r}])))
"""
    with (tmp_path / "console").open("w") as console:
        running = subprocess.Popen([sys.executable, "-c", pipeline], stderr=console)
    deadline = time.monotonic() + 100
    while not ready.exists():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(100) == 75
    assert saved.exists(), "the pipeline did not wait for its step"
    assert (tmp_path / "console").read_text().rstrip().endswith("stopped by a signal; run the same command to go on")


def test_damaged_records_are_named(tmp_path):
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(MaskLLMError, match=r"steps\.json: line 1: not JSON"):
        Steps(tmp_path)
