"""Bad input ends with one line on standard error that names the thing, and a non-zero status; never with a traceback."""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
import signal
import sys
import time

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from maskllm.cli import main
from maskllm.failures import run_guarded


def test_a_path_that_is_not_a_checkpoint_is_named(refused, tmp_path, tiny_hf):
    file = tmp_path / "file"
    file.write_text("x")
    new = tmp_path / "new"
    assert "no such directory" in refused("trim", "--load", tmp_path / "nope", "--output", new)
    assert "not a checkpoint" in refused("export", "--load", tiny_hf, "--output", new)
    assert "is a file; wanted the directory" in refused("convert", "--hf", file, "--output", new)
    assert "config.json: no such file" in refused("convert", "--hf", tmp_path, "--output", new)
    assert f"{file}: is a file, wanted a directory to make" in refused("convert", "--hf", tiny_hf, "--output", file)
    assert not new.exists()


def test_stages_in_the_wrong_order_are_refused(refused, tmp_path, tiny_dense, tiny_pruned):
    new = ["--output", tmp_path / "new"]
    assert "is a dense checkpoint; give it masks first" in refused("trim", "--load", tiny_dense, *new)
    assert "write its masks into the weights first, with `maskllm trim`" in refused("export", "--load", tiny_pruned, *new)
    assert "is a pruned checkpoint; wanted a dense one" in refused("prune", "--load", tiny_pruned, "--method", "magnitude", *new)
    same = refused("trim", "--load", tiny_pruned, "--output", tiny_pruned)
    assert "is the checkpoint that is loaded; name another directory" in same
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("contents", ['{"a": ' + "9" * 5000 + "}", '{"a": ' + "[" * 100_000])
def test_json_that_python_refuses_to_read_is_named(refused, tmp_path, contents):
    (tmp_path / "config.json").write_text(contents)
    assert "config.json: not JSON" in refused("convert", "--hf", tmp_path, "--output", tmp_path / "new")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(contents)
    # The text is read before the model is loaded, with its tokenizer.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    assert f"{lines}:1: not JSON" in refused("evaluate", "--model", tmp_path, "--data", lines, "--seq-length", 8)


def test_an_os_error_without_a_file_is_printed_with_its_message(capsys):
    def fail():
        raise OSError("5 requested and 3 written")

    assert run_guarded("program", fail) == 1
    assert capsys.readouterr().err == "program: error: 5 requested and 3 written\n"


def test_an_interrupt_while_importing_is_one_line(capsys, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupt)
    assert main(["trim", "--load", "a", "--output", "b"]) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


class _InterruptedAtItsEnd:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def _lost_in_a_destructor():
    _InterruptedAtItsEnd()
    time.sleep(60)


def _turned_into_another_error():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ModuleNotFoundError("could not import") from error


@pytest.mark.parametrize("call", [_lost_in_a_destructor, _turned_into_another_error])
def test_an_interrupt_that_a_library_loses_ends_the_program(call, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest itself may ignore it
    try:
        assert run_guarded("program", call) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # another one would only break the end
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "program: error: interrupted; run the same command again\n"


def test_a_checkpoint_of_another_stage_is_not_replaced(refused, tmp_path, tiny_hf, tiny_dense, tiny_pruned):
    dense, pruned = (shutil.copytree(path, tmp_path / path.name) for path in (tiny_dense, tiny_pruned))
    for words, found, stage in (
        (("trim", "--load", tiny_pruned, "--output", dense), "dense", "trimmed"),
        (("prune", "--load", tiny_dense, "--method", "magnitude", "--output", dense), "dense", "pruned"),
        (("convert", "--hf", tiny_hf, "--output", pruned), "pruned", "dense"),
        (("convert", "--hf", "not/downloaded", "--output", pruned), "pruned", "dense"),
    ):
        line = refused(*words)
        assert f"{words[-1] / 'release'}: is a {found} checkpoint, not to be replaced by a {stage} one" in line
    before = (dense / "release" / "maskllm.json").stat().st_ino
    assert main(["convert", "--hf", str(tiny_hf), "--output", str(dense)]) == 0
    assert (dense / "release" / "maskllm.json").stat().st_ino != before


def test_a_path_that_the_terminal_cannot_encode_is_printed_with_escapes(monkeypatch, tmp_path, tiny_hf):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["convert", "--hf", str(tiny_hf), "--output", str(tmp_path / "ünï")]) == 0
    sys.stdout.flush()
    assert rb"\xfcn\xef/release" in written.getvalue()


def test_a_message_with_a_line_end_in_a_path_is_one_line(refused, tmp_path):
    assert r"two\nlines: no such directory" in refused("trim", "--load", tmp_path / "two\nlines", "--output", tmp_path / "new")


@contextlib.contextmanager
def small_files():
    """A block in which files can have 8 KiB at most: writing fails as on a full disk. Write no other files in it, such as logs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("verb", ["convert", "trim", "export"])
def test_a_full_disk_is_one_line(refused, verb, tmp_path, tiny_hf, tiny_dense, tiny_pruned):
    new = tmp_path / "new"
    source = {"convert": ["--hf", tiny_hf], "trim": ["--load", tiny_pruned], "export": ["--load", tiny_dense]}[verb]
    with small_files():
        line = refused(verb, *source, "--output", new)
    assert str(new) in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
