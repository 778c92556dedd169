"""Only one job writes to an output directory. A restarted job waits for its own old lock."""

from __future__ import annotations

import contextlib
import fcntl
import json
import threading
import time

import pytest

from maskllm.errors import MaskLLMError
from maskllm.output_lock import LOCK, output_lock


@pytest.fixture
def elsewhere(tmp_path):
    """A lock that a process of torchrun's job "mine" holds on another machine."""
    with (tmp_path / LOCK).open("w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"host": "another machine", "pid": 7, "job": "mine"}))
        file.flush()
        yield file


@pytest.mark.parametrize(("job", "restarts"), [("mine", "0"), ("other", "1")])
def test_another_job_and_a_first_start_are_refused_at_once(job, restarts, elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    started = time.monotonic()
    with pytest.raises(MaskLLMError, match="process 7 on another machine is writing there"), output_lock(tmp_path, "--save"):
        pass
    assert time.monotonic() - started < 60, "it waited"


def test_a_restarted_job_waits_for_the_lock_that_its_dead_machine_held(elsewhere, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    waited = []
    with contextlib.ExitStack() as stack:
        timer = threading.Timer(0.5, lambda: (waited.append(True), elsewhere.close()))
        timer.start()
        stack.callback(timer.join)
        stack.enter_context(output_lock(tmp_path, "--save"))
        assert waited
        assert json.loads((tmp_path / LOCK).read_text())["job"] == "mine"
