"""Bad input ends in one line on standard error that names the thing, and a non-zero status; never in a traceback."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from maskllm import train
from maskllm.cli import VERBS, main
from maskllm.cli.train_options import parse_arguments
from maskllm.errors import MaskLLMError
from maskllm.failures import run_guarded
from maskllm.files import atomic_directory, atomic_file, explain_safetensors_errors
from maskllm.quickstart.pipeline import QuickstartSettings
from maskllm.quickstart.steps import Steps


def refused(capsys, *argv: object) -> str:
    """Run `maskllm ARGV`, which must fail with one line; returns the line."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"maskllm {argv[0]}: error: ")
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_complete(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    parser = argparse.ArgumentParser()
    importlib.import_module(f"maskllm.cli.{verb}").add_arguments(parser)
    assert all(action.help for action in parser._actions)
    assert "--output" in text or "--json" in text
    assert "default: None" not in text
    assert "default: False" not in text


def test_usage_errors_end_with_status_2(capsys):
    for argv in ([], ["frobnicate"], ["convert"], ["preprocess", "--workers", "0"], ["evaluate", "--model", "a", "--load", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "quickstart"])
def test_a_place_for_the_numbers_that_cannot_be_written_is_refused_before_the_work(verb, capsys, tmp_path):
    pipe, link, file, missing = tmp_path / "pipe", tmp_path / "link", tmp_path / "file", str(tmp_path / "missing")
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    (tmp_path / "two\nlines").mkdir()
    file.write_text("x")
    parser = argparse.ArgumentParser()
    importlib.import_module(f"maskllm.cli.{verb}").add_arguments(parser)
    required = [word for action in parser._actions if action.required for word in (action.option_strings[0], missing)]
    if verb == "evaluate":
        required = ["--model", missing, "--data", missing, "--seq-length", "8"]
    for place, reason in (
        (tmp_path, "is a directory"),
        (pipe, "is not a regular file"),
        (link, "link: is not a regular file"),
        (tmp_path / "two\nlines", r"two\nlines: is a directory"),
        ("-", "found '-', wanted a file's path"),
        (file / "f.json", f"{file} is not a directory"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([verb, *required, "--json", str(place)])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "--json" in error
        assert reason in error


def test_what_is_not_a_checkpoint_is_named(capsys, tmp_path, tiny_hf):
    file = tmp_path / "file"
    file.write_text("x")
    new = tmp_path / "new"
    assert "no such directory" in refused(capsys, "trim", "--load", tmp_path / "nope", "--output", new)
    assert "not a checkpoint" in refused(capsys, "export", "--load", tiny_hf, "--output", new)
    assert "is a file; wanted the directory" in refused(capsys, "convert", "--hf", file, "--output", new)
    assert "config.json: no such file" in refused(capsys, "convert", "--hf", tmp_path, "--output", new)
    assert f"{file}: is a file, wanted a directory to make" in refused(capsys, "convert", "--hf", tiny_hf, "--output", file)
    assert not new.exists()


def test_what_an_unset_variable_leaves_is_refused(capsys, tmp_path, monkeypatch, tiny_hf, tiny_dense):
    """An empty path would mean the working directory."""
    monkeypatch.chdir(tmp_path)
    assert "--output: found an empty value" in refused(capsys, "convert", "--hf", tiny_hf, "--output", "")
    assert "--load: found an empty value" in refused(capsys, "export", "--load", "", "--output", "hf")
    assert "--input: found an empty value" in refused(
        capsys, "preprocess", "--input", "a", "", "--output-prefix", "p", "--tokenizer", "t"
    )
    for options, name in ((["--data-path", "data", "--save", ""], "--save"), (["--data-path", "1", ""], "--data-path")):
        assert train.main([*options, "--load", str(tiny_dense)]) == 1
        assert (
            capsys.readouterr().err == f"maskllm.train: error: {name}: found an empty value; give it one, or leave the option out\n"
        )
    assert not list(tmp_path.iterdir())


def test_stages_in_the_wrong_order_are_refused(capsys, tmp_path, tiny_dense, tiny_pruned):
    new = ["--output", tmp_path / "new"]
    assert "is a dense checkpoint; give it masks first" in refused(capsys, "trim", "--load", tiny_dense, *new)
    assert "write its masks into the weights first, with `maskllm trim`" in refused(capsys, "export", "--load", tiny_pruned, *new)
    line = refused(capsys, "prune", "--load", tiny_pruned, "--method", "magnitude", *new)
    assert "is a pruned checkpoint; wanted a dense one" in line
    same = refused(capsys, "trim", "--load", tiny_pruned, "--output", tiny_pruned)
    assert "is the checkpoint that is loaded; name another directory" in same
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("contents", ['{"a": ' + "9" * 5000 + "}", '{"a": ' + "[" * 100_000])
def test_json_that_python_refuses_to_read_is_named(capsys, tmp_path, contents):
    (tmp_path / "config.json").write_text(contents)
    assert "config.json: not JSON" in refused(capsys, "convert", "--hf", tmp_path, "--output", tmp_path / "new")
    lines = tmp_path / "lines.jsonl"
    lines.write_text(contents)
    line = refused(
        capsys, "evaluate", "--model", tmp_path, "--data", lines, "--seq-length", 8
    )  # the text is read before the model is loaded
    assert f"{lines}:1: not JSON" in line


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_named(device):
    from maskllm.evaluation.huggingface import usable_device

    with pytest.raises(MaskLLMError, match=f"--device {device}: cannot be used here"):
        usable_device(device)
    assert usable_device("cpu").type == "cpu"


def test_options_of_the_other_model_kind_are_refused(capsys, tiny_dense):
    common = ["evaluate", "--load", tiny_dense, "--data", "text", "--seq-length", 8]
    assert "--mask: applies to --model" in refused(capsys, *common, "--mask", "m.npz")
    assert "--device, --trust-remote-code: apply to --model only" in refused(capsys, *common, "--device", "cpu")


def test_a_damaged_mask_file_is_named(tmp_path):
    from maskllm.export.mask_file import apply_mask_file

    path = tmp_path / "m.npz"
    np.savez(path, **{"w.mask": np.zeros(1, np.uint8)})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 8] |= 1  # the flag of an encrypted entry
    path.write_bytes(data)
    with pytest.raises(MaskLLMError, match=r"m\.npz: not a readable \.npz mask file"):
        apply_mask_file(path, {"w": np.zeros(0)})


def test_an_error_that_names_no_file_says_what_it_is(capsys):
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


@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
def test_a_full_disk_names_the_output_and_leaves_nothing(tmp_path, atomic):
    with pytest.raises(OSError, match="No space left") as caught, atomic(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_in_an_output_files_place_is_named_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place, found in ((tmp_path, "a directory"), (tmp_path / "pipe", "not a regular file")):
        with pytest.raises(MaskLLMError, match=f"{place}: is {found}, wanted a file to write"), atomic_file(place):
            pass
    assert (tmp_path / "pipe").is_fifo()


def test_what_a_killed_replacement_left_does_not_stop_the_next(tmp_path):
    for kept in (tmp_path / "out", tmp_path / ".out.old"):
        kept.mkdir()
        (kept / "old").touch()
    with atomic_directory(tmp_path / "out") as temporary:
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_safetensors_file_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "missing" / "weights"
    with pytest.raises(MaskLLMError, match=r"weights: cannot be written: .*No such file"), explain_safetensors_errors(path):
        save_file({"a": torch.zeros(1)}, path)


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_goes_where_the_link_points(tmp_path, there):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "file").symlink_to(Path("disk") / "file")  # relative, as people make them
    (tmp_path / "directory").symlink_to(disk / "directory")
    if there:
        (disk / "file").write_text("old")
        (disk / "directory").mkdir()
        (disk / "directory" / "old").write_text("old")
    with atomic_file(tmp_path / "file") as temporary:
        temporary.write_text("new")
    with atomic_directory(tmp_path / "directory") as temporary:
        (temporary / "new").write_text("new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "directory").is_symlink()
    assert {str(path.relative_to(disk)) for path in disk.rglob("*")} == {"file", "directory", "directory/new"}
    assert (disk / "file").read_text() == "new"


@pytest.mark.parametrize("atomic", [atomic_file, atomic_directory])
def test_directories_made_for_an_output_that_fails_go_again(tmp_path, atomic):
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "some" / "where" / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_outputs_in_each_others_place_are_refused_before_the_work(capsys, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for verb, *places in (
        ("export", "--output", "out", "--mask-file", "out/config.json"),
        ("export", "--output", "out", "--mask-file", "link/config.json"),
        ("export", "--output", "out", "--mask-file", "out"),
        ("export", "--output", "out/hf", "--mask-file", "out"),
        ("export", "--output", "out", "--mask-file", "file", "--json", "file"),
        ("convert", "--output", "out", "--json", "out/release/maskllm.json"),
    ):
        words = [word if word.startswith("--") else tmp_path / word for word in places]
        line = refused(capsys, verb, "--hf" if verb == "convert" else "--load", "no", *words)
        assert line.endswith(f"{words[-2]} {words[-1]}: one is, or lies in, the other; name places apart from each other")
    apart = ["--output", tmp_path / "out", "--mask-file", tmp_path / "out.npz", "--json", tmp_path / "out.json"]
    assert "no: no such directory" in refused(capsys, "export", "--load", "no", *apart)


def test_what_a_verb_reads_or_has_just_made_is_not_written_over(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("{}")
    Path("link").symlink_to("text")
    for words, other in (
        (("preprocess", "--input", "other", "text", "--output-prefix", "p", "--tokenizer", "t", "--json", "link"), "--input text"),
        (
            ("preprocess", "--input", "text", "--output-prefix", "p", "--tokenizer", "t", "--json", "p_text_document.idx"),
            "--output-prefix p",
        ),
        (("evaluate", "--model", "m", "--data", "text", "--seq-length", "8", "--json", "./text"), "--data text"),
        (("prune", "--load", "l", "--output", "o", "--calibration-data", "d", "--json", "d.bin"), "--calibration-data d"),
    ):
        assert refused(capsys, *words).endswith(f"--json {words[-1]}: is a file of {other}; name another")
    assert Path("text").read_text() == "{}"


def test_a_checkpoint_of_another_stage_is_not_replaced(capsys, tmp_path, tiny_hf, tiny_dense, tiny_pruned):
    dense, pruned = (shutil.copytree(path, tmp_path / path.name) for path in (tiny_dense, tiny_pruned))
    for words, found, stage in (
        (("trim", "--load", tiny_pruned, "--output", dense), "dense", "trimmed"),
        (("prune", "--load", tiny_dense, "--method", "magnitude", "--output", dense), "dense", "pruned"),
        (("convert", "--hf", tiny_hf, "--output", pruned), "pruned", "dense"),
        (("convert", "--hf", "not/downloaded", "--output", pruned), "pruned", "dense"),
    ):
        line = refused(capsys, *words)
        assert f"{words[-1] / 'release'}: is a {found} checkpoint, not to be replaced by a {stage} one" in line
    before = (dense / "release" / "maskllm.json").stat().st_ino
    assert main(["convert", "--hf", str(tiny_hf), "--output", str(dense)]) == 0
    assert (dense / "release" / "maskllm.json").stat().st_ino != before


def test_a_path_that_the_terminal_cannot_spell_does_not_end_in_a_traceback(monkeypatch, tmp_path, tiny_hf):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["convert", "--hf", str(tiny_hf), "--output", str(tmp_path / "ünï")]) == 0
    sys.stdout.flush()
    assert rb"\xfcn\xef/release" in written.getvalue()


def test_a_line_end_in_a_path_leaves_the_message_one_line(capsys, tmp_path):
    assert r"two\nlines: no such directory" in refused(
        capsys, "trim", "--load", tmp_path / "two\nlines", "--output", tmp_path / "new"
    )


@pytest.mark.parametrize(
    ("verb", "option", "required"),
    [("preprocess", "--input", ["--output-prefix", "p", "--tokenizer", "t"]), ("quickstart", "--corpus", ["--output", "o"])],
)
def test_files_given_one_by_one_are_all_taken(verb, option, required):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"maskllm.cli.{verb}").add_arguments(parser)
    found = parser.parse_args([*required, option, "a", option, "b", "c"])
    assert getattr(found, option.removeprefix("--")) == ["a", "b", "c"]


def test_datasets_given_one_by_one_are_all_taken():
    assert parse_arguments(["--data-path", "1", "a", "--data-path", "2", "b"]).data_path == ["1", "a", "2", "b"]


@contextlib.contextmanager
def small_files():
    """The largest file size is 8 KiB: writing fails as on a full disk. The tests' own log must not be written meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("verb", ["convert", "trim", "export"])
def test_a_file_that_the_disk_does_not_take_is_one_line(verb, capsys, tmp_path, tiny_hf, tiny_dense, tiny_pruned):
    new = tmp_path / "new"
    source = {"convert": ["--hf", tiny_hf], "trim": ["--load", tiny_pruned], "export": ["--load", tiny_dense]}[verb]
    with small_files():
        line = refused(capsys, verb, *source, "--output", new)
    assert str(new) in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 0}, "--processes: found 0"),
        ({"train_iters": -1}, "--train-iters: found -1"),
        ({"lr": float("nan")}, "--lr: found nan"),
        ({"min_lr": 1.0}, "--min-lr 1.0: wanted at most --lr"),
        ({"eval_seq_length": 1}, "--eval-seq-length 1"),
    ],
)
def test_quickstart_refuses_settings_before_its_first_step(change, message):
    QuickstartSettings().check()
    with pytest.raises(MaskLLMError, match=message):
        QuickstartSettings(**change).check()


def test_quickstart_has_two_processes_or_one_where_there_is_one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert QuickstartSettings().processes == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    QuickstartSettings().check()
    assert QuickstartSettings().processes == 1
    with pytest.raises(MaskLLMError, match="--processes 2: each needs its own GPU, found 1"):
        QuickstartSettings(processes=2).check()


def test_quickstart_refuses_what_the_model_cannot_do_before_pruning(tiny_dense):
    from maskllm.checkpoints.reading import resolve

    model = resolve(tiny_dense).model_config  # 4 layers, 128 positions
    fits = {"seq_length": 128, "eval_seq_length": 128, "processes": 4}
    QuickstartSettings(**fits).check_fits(model)
    for change, message in (
        ({"processes": 3}, "--processes 3: wanted a number that divides the model's 4 layers"),
        ({"seq_length": 129}, "--seq-length 129: the model has a context of 128 tokens"),
        ({"eval_seq_length": 129}, "--eval-seq-length 129: the model has a context of 128 tokens"),
    ):
        with pytest.raises(MaskLLMError, match=message):
            QuickstartSettings(**(fits | change)).check_fits(model)


def test_quickstart_names_a_missing_corpus_before_its_first_step(capsys, tmp_path):
    output = tmp_path / "out"
    line = refused(capsys, "quickstart", "--output", output, "--corpus", tmp_path / "no.json", "--eval-corpus", Path(__file__))
    assert "no.json: no such file" in line
    assert not output.exists()


def test_quickstart_names_damaged_records(tmp_path):
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(MaskLLMError, match=r"steps\.json: line 1: not JSON"):
        Steps(tmp_path)
