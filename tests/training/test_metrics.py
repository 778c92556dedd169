"""The metrics of a run: the same numbers in the JSON lines, in TensorBoard and on the console."""

from __future__ import annotations

import contextlib
import io
import json
import math
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskllm import train
from maskllm.checkpoints.reading import resolve
from maskllm.cli.train_options import parse_arguments
from maskllm.errors import MaskLLMError, StoppedError
from maskllm.megatron.process_groups import parallel_processes
from maskllm.training.log import MetricsWriter
from maskllm.training.loop import Trainer

TRAIN = {
    "loss", "regularizer", "temperature", "scale", "mean_max_probability", "changed_since_last", "changed_since_prior", "grad_norm",
    "skipped_steps", "learning_rate", "tokens_per_second", "peak_memory_gib",
}  # fmt: skip
VALIDATION = {"loss_sampled", "loss_winner"}
STEPS = 4


@pytest.mark.usefixtures("signal_handlers")
def test_a_run_reports_every_metric_in_all_three_places(tmp_path, tiny_dataset, tiny_pruned, capfd):
    save, board = tmp_path / "run", tmp_path / "board"
    options = {
        "--load": tiny_pruned, "--save": save, "--tensorboard-dir": board, "--train-iters": STEPS, "--global-batch-size": 2,
        "--seq-length": 32, "--lr": 0.01, "--min-lr": 0.001, "--params-dtype": "fp32", "--split": "80,20,0", "--log-interval": 1,
        "--eval-interval": 2, "--eval-iters": 1,
    }  # fmt: skip
    blend = ["--data-path", "0.3", tiny_dataset, "0.7", tiny_dataset]
    assert train.main([str(part) for option in options.items() for part in option] + blend) == 0

    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "validation")}
    assert [line["iteration"] for line in by_kind["train"]] == [1, 2, 3, 4]
    assert [line["iteration"] for line in by_kind["validation"]] == [2, 4]
    for kind, names in (("train", TRAIN), ("validation", VALIDATION)):
        assert all(set(line) == {"kind", "iteration"} | names for line in by_kind[kind])
        assert all(math.isfinite(line[name]) for line in by_kind[kind] for name in names)

    for step, line in enumerate(by_kind["train"]):
        cosine = 0.001 + 0.009 * (1 + math.cos(math.pi * step / STEPS)) / 2
        assert line["learning_rate"] == pytest.approx(cosine, rel=1e-6)
        assert line["temperature"] == pytest.approx(4 + (0.05 - 4) * step / STEPS)
        assert line["scale"] == pytest.approx(100 + 400 * step / STEPS)
        assert 1 / 6 < line["mean_max_probability"] <= 1
        assert line["tokens_per_second"] > 0
        assert 0.05 < line["peak_memory_gib"] < 100
    assert by_kind["train"][-1]["changed_since_prior"] > 0

    events = EventAccumulator(str(board))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in TRAIN} | {f"validation/{name}" for name in VALIDATION}
    for kind, found in by_kind.items():
        for name in found[0].keys() - {"kind", "iteration"}:
            scalars = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
            assert scalars == [(line["iteration"], pytest.approx(line[name], rel=1e-6)) for line in found], name

    console = capfd.readouterr().err
    for line in by_kind["train"]:
        assert f"train iteration {line['iteration']} | loss {line['loss']:.4g} | " in console
    assert f"validation iteration 4 | loss sampled {by_kind['validation'][1]['loss_sampled']:.4g} | loss winner " in console


@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize("steps", [1, 4])
def test_a_signal_during_validation_saves_without_waiting_for_its_end(steps, tmp_path, tiny_dataset, tiny_pruned):
    options = {
        "--data-path": tiny_dataset, "--load": tiny_pruned, "--save": tmp_path / "run", "--train-iters": steps, "--global-batch-size": 2,
        "--seq-length": 32, "--params-dtype": "fp32", "--split": "80,20,0", "--eval-interval": 1, "--eval-iters": 50,
    }  # fmt: skip
    arguments = parse_arguments([str(part) for option in options.items() for part in option])
    places = []

    def progress(where: str | None = None) -> None:
        places.append(where or places[-1])
        if len(places) > 1 and "validation" in places[-2]:
            signal.raise_signal(signal.SIGTERM)

    console = io.StringIO()
    early = pytest.raises(StoppedError, match="after iteration 1; saved at iteration 1") if steps > 1 else contextlib.nullcontext()
    with parallel_processes(), early:
        Trainer(arguments, console=console, progress=progress).train()
    assert "a signal stopped the validation after iteration 1" in console.getvalue()
    validated = [place for place in places if "validation" in place]
    assert len(validated) == 1 + 2, "one batch of two micro-batches, of 2 x 50"
    assert resolve(tmp_path / "run").iteration == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl", None, 0, io.StringIO())
    writer.close()
    with (
        contextlib.suppress(OSError),  # it cannot be closed either
        Path("/dev/full").open("w") as writer.file,
        pytest.raises(MaskLLMError) as caught,
    ):
        writer.write("train", 1, {"loss": 1.0})
    assert str(caught.value) == "/dev/full: cannot be written (No space left on device)"


def test_a_resumed_run_removes_an_incomplete_line_and_those_of_steps_that_it_repeats(tmp_path):
    file = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"kind": "train", "iteration": step, "loss": 1.0}) + "\n" for step in (1, 2, 3)]
    file.write_text("".join(whole) + '{"kind": "train", "itera')
    writer = MetricsWriter(file, None, 2, io.StringIO())
    writer.write("train", 3, {"loss": 0.5, "changed_since_prior": None})
    writer.close()
    lines = file.read_text().splitlines(keepends=True)
    assert lines[:2] == whole[:2]
    assert [json.loads(line) for line in lines[2:]] == [{"kind": "train", "iteration": 3, "loss": 0.5, "changed_since_prior": None}]
