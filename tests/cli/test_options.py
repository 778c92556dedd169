"""Options of the verbs: help, usage errors, repeated options, and paths that would destroy something."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import pytest

from maskllm import train
from maskllm.cli import VERBS, main
from maskllm.cli.train_options import parse_arguments


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


@pytest.mark.parametrize(
    ("verb", "option", "required"),
    [("preprocess", "--input", ["--output-prefix", "p", "--tokenizer", "t"]), ("quickstart", "--corpus", ["--output", "o"])],
)
def test_a_repeated_option_for_files_keeps_them_all(verb, option, required):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"maskllm.cli.{verb}").add_arguments(parser)
    found = parser.parse_args([*required, option, "a", option, "b", "c"])
    assert getattr(found, option.removeprefix("--")) == ["a", "b", "c"]


def test_a_repeated_data_path_keeps_all_datasets():
    assert parse_arguments(["--data-path", "1", "a", "--data-path", "2", "b"]).data_path == ["1", "a", "2", "b"]


def test_an_empty_value_is_refused(refused, capsys, tmp_path, monkeypatch, tiny_hf, tiny_dense):
    """An unset shell variable leaves an empty value. As a path it would mean the working directory."""
    monkeypatch.chdir(tmp_path)
    assert "--output: found an empty value" in refused("convert", "--hf", tiny_hf, "--output", "")
    assert "--load: found an empty value" in refused("export", "--load", "", "--output", "hf")
    assert "--input: found an empty value" in refused("preprocess", "--input", "a", "", "--output-prefix", "p", "--tokenizer", "t")
    for options, name in ((["--data-path", "data", "--save", ""], "--save"), (["--data-path", "1", ""], "--data-path")):
        assert train.main([*options, "--load", str(tiny_dense)]) == 1
        assert (
            capsys.readouterr().err == f"maskllm.train: error: {name}: found an empty value; give it one, or leave the option out\n"
        )
    assert not list(tmp_path.iterdir())


def test_options_of_the_other_model_kind_are_refused(refused, tiny_dense):
    common = ["evaluate", "--load", tiny_dense, "--data", "text", "--seq-length", 8]
    for option in ("--mask", "--mask-base"):
        assert f"{option}: applies to --model" in refused(*common, option, "m.npz")
    assert "--device, --trust-remote-code: apply to --model only" in refused(*common, "--device", "cpu")


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("quickstart", "finetune")])  # these write report.json
def test_a_json_path_that_cannot_be_written_is_refused_before_the_work(verb, capsys, tmp_path):
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


def test_outputs_that_overlap_are_refused_before_the_work(refused, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for verb, *places in (
        ("export", "--output", "out", "--mask-file", "out/config.json"),
        ("export", "--output", "out", "--mask-file", "link/config.json"),
        ("export", "--output", "out", "--mask-file", "out"),
        ("export", "--output", "out/hf", "--mask-file", "out"),
        ("export", "--output", "out", "--mask-file", "file", "--json", "file"),
        ("convert", "--output", "out", "--json", "out/release/maskllm.json"),
        ("benchmark", "--json", "out.svg", "--figure", "out.svg"),
    ):
        words = [word if word.startswith("--") else tmp_path / word for word in places]
        line = refused(verb, {"convert": "--hf", "benchmark": "--model"}.get(verb, "--load"), "no", *words)
        assert line.endswith(f"{words[-2]} {words[-1]}: one is, or lies in, the other; name places apart from each other")
    apart = ["--output", tmp_path / "out", "--mask-file", tmp_path / "out.npz", "--json", tmp_path / "out.json"]
    assert "no: no such directory" in refused("export", "--load", "no", *apart)


def test_the_numbers_do_not_overwrite_an_input_or_output(refused, tmp_path, monkeypatch):
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
        assert refused(*words).endswith(f"--json {words[-1]}: is a file of {other}; name another")
    assert Path("text").read_text() == "{}"
