"""What stops a run before its last step: signals, and dataset files that disappear."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from maskllm.errors import MaskLLMError, StoppedError
from maskllm.megatron.process_groups import parallel_processes
from maskllm.training.surviving.stopping import Stopping

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture(autouse=True)
def group():
    with parallel_processes():
        yield


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_run_after_the_step(number):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stopping = Stopping([])
    stopping.catch_signals()
    assert not stopping.agree_after_step(0, skip=False)
    assert not stopping.requested
    signal.raise_signal(number)
    assert not stopping.requested, "the ranks have not exchanged their flags"
    assert stopping.agree_after_step(1, skip=True), "the flag of the skipped step is lost"
    assert stopping.requested
    with pytest.raises(StoppedError, match="stopped by a signal after iteration 2; saved") as caught:
        stopping.end(2, "saved")
    assert caught.value.exit_status == 75


def test_a_signal_is_noticed_between_steps_too():
    stopping = Stopping([])
    stopping.catch_signals()
    assert not stopping.agree_on_signals()
    signal.raise_signal(signal.SIGTERM)
    assert stopping.agree_on_signals() and stopping.requested


def test_under_nohup_a_closed_terminal_does_not_stop_the_run():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping = Stopping([])
    stopping.catch_signals()
    signal.raise_signal(signal.SIGHUP)
    assert not stopping.agree_on_signals()


@pytest.fixture
def dataset(tmp_path) -> Path:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"data{suffix}").write_bytes(b"1234")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, r"data\.bin has disappeared \(No such file or directory\); put it back; saved"),
        (lambda path: path.write_bytes(b"12"), r"data\.bin has 2 bytes, it had 4 when the run started; put it back; saved"),
    ],
    ids=["removed", "cut"],
)
def test_a_changed_dataset_file_stops_the_run(change, message, dataset, capsys):
    stopping = Stopping([str(dataset)])
    stopping.agree_after_step(0, skip=False)
    assert not stopping.requested
    change(dataset.with_suffix(".bin"))
    stopping.agree_after_step(1, skip=False)
    assert stopping.requested
    assert "iteration 2: --data-path: " in capsys.readouterr().err
    with pytest.raises(MaskLLMError, match=message) as caught:
        stopping.end(2, "saved")
    assert not isinstance(caught.value, StoppedError)


def test_one_rank_of_a_machine_watches_the_files(dataset, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    stopping = Stopping([str(dataset)])
    dataset.with_suffix(".bin").unlink()
    stopping.agree_after_step(0, skip=False)
    assert not stopping.requested
