"""The processes that other tests run programs in (tests/ranks.py) end as those of Python and torchrun do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.ranks import heed_interrupts

WAITS = """
import os, signal, sys, time
from pathlib import Path

def stop(*_):
    Path(f"stopped-{os.environ.get('RANK')}").touch()
    sys.exit(75)

signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
if os.environ.get("RANK") == "1":
    while not Path("fail").exists():
        time.sleep(0.01)
    sys.exit("rank 1 fails")
time.sleep(60)
"""


@pytest.fixture
def program(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(WAITS)
    return str(tmp_path / "program.py")


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 100
    while text not in path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_a_ranks_failure_the_others_get_sigterm(ranks, program, tmp_path):
    console = tmp_path / "console"
    with console.open("w") as file:
        job = ranks.start(2, [program], [file.fileno()] * 2)
    wait_for(console, "ready\nready\n")
    assert job.poll() is None
    (tmp_path / "fail").touch()
    assert job.wait(60) == 1
    assert "rank 1 fails" in console.read_text()
    assert (tmp_path / "stopped-0").exists() and not (tmp_path / "stopped-1").exists()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, -signal.SIGINT), (signal.SIGHUP, -signal.SIGHUP)]
)
def test_a_stand_in_for_python_passes_signals_on_and_ends_as_its_program(ranks, program, tmp_path, number, status):
    console = tmp_path / "console"
    with console.open("w") as file:
        stand_in = subprocess.Popen([ranks.programs(tmp_path), program], stdout=file, stderr=file, preexec_fn=heed_interrupts)
    wait_for(console, "ready\n")
    stand_in.send_signal(number)
    assert stand_in.wait(60) == status
    assert (tmp_path / "stopped-None").exists() == (number == signal.SIGTERM)
    assert ("KeyboardInterrupt" in console.read_text()) == (number == signal.SIGINT)


@pytest.mark.slow
def test_ranks_have_the_environment_that_torchrun_gives_them(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "environment.py"
    program.write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(program)]
    found = []
    for count, command in ((1, [str(program)]), (None, words)):
        with (tmp_path / "console").open("w+") as file:
            options = {"PYTHON_EXEC": str(ranks.programs(tmp_path))} if count is None else {}
            assert ranks.start(count, command, [file.fileno()] * 2, **options).wait(100) == 0
            file.seek(0)
            found.append(json.loads(file.read().splitlines()[-1]))
    ours, torchruns = found
    differs = {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    assert differs <= ours.keys() and differs <= torchruns.keys()
    set_by_us = ours.keys() - os.environ.keys() - differs
    assert len(set_by_us) >= 8
    assert {name: ours[name] for name in set_by_us} == {name: torchruns.get(name) for name in set_by_us}
