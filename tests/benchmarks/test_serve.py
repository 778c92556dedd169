"""The measurement of vLLM's servers, without vLLM: which model is served, and that no server outlives the measurement."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import models, serve
from maskllm.errors import MaskLLMError
from maskllm.processes import is_gone

STAND_IN = f"""#!{sys.executable} -ISE
import http.server, os, signal, subprocess, sys
own = subprocess.Popen(["sleep", "600"])
def stop(number, frame):
    own.kill()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers)
print(os.getpid(), own.pid, flush=True)
server.serve_forever()
"""
SIZES = ["--layers", "1", "--hidden", "64", "--mlp", "128", "--heads", "2", "--kv-heads", "2", "--vocabulary", "96"]


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until something holds. Raises AssertionError after 30 seconds."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_server_outlives_the_measurement(number, status, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def measure(args, work: Path) -> None:
        with serve.serving(args.vllm_python, work, work / "log"):
            (work / "served").touch()
            time.sleep(600)

    monkeypatch.setattr(serve, "measure", measure)
    arguments = ["--vllm-python", str(python), "--work", str(tmp_path)]
    process = multiprocessing.get_context("fork").Process(target=serve.main, args=(arguments,))
    process.start()
    try:
        wait_for((tmp_path / "served").exists)
        servers = list(map(int, (tmp_path / "log").read_text().splitlines()[0].split()))
        assert len(servers) == 2 and not any(map(is_gone, servers))
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == status
        wait_for(lambda: all(map(is_gone, servers)))
    finally:
        process.kill()


def test_the_served_model_has_the_sizes_that_are_recorded(tmp_path, monkeypatch):
    def serving(*_, **__):
        raise TimeoutError("a server would start")

    monkeypatch.setattr(serve, "serving", serving)
    arguments = ["--vllm-python", "python", "--dtype", "float32", "--work", str(tmp_path), *SIZES]

    def run(*more: str) -> None:
        serve.measure(serve.parse_arguments([*arguments, *more]), tmp_path)

    def broken(path: Path, *_) -> None:
        path.mkdir()
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(serve, "write_random_llama", broken)
        with pytest.raises(OSError, match="full"):
            run()
    with pytest.raises(TimeoutError, match="a server would start"):
        run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compressed-16", "dense"]
    with pytest.raises(MaskLLMError, match=r"dense: holds another model: num_hidden_layers 1 \(wanted 2\); give another --work"):
        run("--layers", "2")
    with pytest.raises(MaskLLMError, match=r"dtype torch.float32 \(wanted torch.float16\)"):
        run("--dtype", "float16")
    assert models.made(tmp_path / "dense", broken) == tmp_path / "dense"
