"""`maskllm prune` on two ranks, and on checkpoints that two ranks wrote: the masks of one rank, and each error reported once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from maskllm.cli import main
from tests.pruning.pruned import assert_same, calibrated

LAYOUTS = {"tp2": (2, 1), "pp2": (1, 2), "dp2": (1, 1)}
SPARSEGPT = ("sparsegpt", "--update-weights", "--params-dtype", "bf16")
FITTED = ("sparsegpt", "--least-squares", "--params-dtype", "bf16")

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """The results of one job of two ranks, which ran everything that the tests below check."""

    folder: Path
    errors: str
    """The job's standard error."""
    statuses: dict[str, list[int]]
    """A command's name -> its exit status on each rank."""

    def complaints(self, *words: str) -> list[str]:
        """The lines of standard error that contain all of `words`."""
        return [line for line in self.errors.splitlines() if all(word in line for word in words)]


@pytest.fixture(scope="module")
def job(tmp_path_factory, ranks, tiny_dense, tiny_dataset) -> Job:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "foreign" / "release").mkdir(parents=True)
    (folder / ".blocked.layers").write_text("in the way of a directory that only the first rank creates")

    def prune(load: object, output: str, *options: object) -> list[str]:
        return ["prune", "--load", str(load), "--output", str(folder / output), *map(str, options)]

    # An error is reported once per process group. Each command sets up its own.
    commands = {
        "bad pattern": prune(tiny_dense, "never", "--pattern", "half"),
        "sparsegpt": prune(tiny_dense, "sparsegpt", *calibrated(tiny_dataset, *SPARSEGPT)),
        "least squares": prune(tiny_dense, "fitted", *calibrated(tiny_dataset, *FITTED)),
        "bad usage": prune(tiny_dense, "never", "--method", "guess"),
        "magnitude": prune(tiny_dense, "magnitude", "--method", "magnitude"),
        "bad path": prune(folder / "nowhere", "never", "--method", "magnitude"),
        "no data": prune(tiny_dense, "never", *calibrated(folder / "no-data", "wanda")),
        "foreign output": prune(tiny_dense, "foreign", *calibrated(tiny_dataset, "wanda")),
        "one rank only": prune(tiny_dense, "blocked", *calibrated(tiny_dataset, "wanda")),
    }
    layouts = {str(folder / name): sizes for name, sizes in LAYOUTS.items()}
    (folder / "job.json").write_text(json.dumps({"layouts": layouts, "commands": list(commands.values())}))
    done = ranks(2, "tests.pruning.ranks_worker", tiny_dense, folder / "job.json")
    found = [json.loads((folder / f"job.json.{rank}").read_text()) for rank in range(2)]
    return Job(folder, done.stderr, {name: list(both) for name, both in zip(commands, zip(*found, strict=True), strict=True)})


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, tiny_dense, tiny_dataset) -> Path:
    """The dense checkpoint, pruned by one process."""
    path = tmp_path_factory.mktemp("one") / "pruned"
    assert main(["prune", "--load", str(tiny_dense), "--output", str(path), *calibrated(tiny_dataset, *SPARSEGPT)]) == 0
    return path


def test_two_ranks_find_the_same_masks_as_one(job, one_rank):
    """Bit for bit, including updated weights, although the ranks split the samples and the matrices."""
    assert job.statuses["sparsegpt"] == [0, 0]
    assert_same(one_rank, job.folder / "sparsegpt")


def test_two_ranks_fit_the_same_weights_as_one(job, tiny_dense, tiny_dataset, tmp_path):
    assert job.statuses["least squares"] == [0, 0]
    assert main(["prune", "--load", str(tiny_dense), "--output", str(tmp_path / "out"), *calibrated(tiny_dataset, *FITTED)]) == 0
    assert_same(tmp_path / "out", job.folder / "fitted")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_that_wrote_a_checkpoint_does_not_matter(layout, job, one_rank, tiny_dataset, tmp_path):
    load = job.folder / layout
    files = {file.name for file in (load / "release").glob("*.distcp")}
    assert any(name.startswith("__1_") for name in files) == (layout != "dp2"), (
        "the second rank must have written parts of the model, except under data parallelism"
    )
    assert main(["prune", "--load", str(load), "--output", str(tmp_path / "out"), *calibrated(tiny_dataset, *SPARSEGPT)]) == 0
    assert_same(one_rank, tmp_path / "out")


def test_two_ranks_prune_without_data_as_one_does(job, tiny_pruned):
    assert job.statuses["magnitude"] == [0, 0]
    assert_same(tiny_pruned, job.folder / "magnitude")


@pytest.mark.parametrize(
    ("mistake", "status", "words"),
    [
        ("bad usage", 2, ["error: argument --method: invalid choice: 'guess'"]),
        ("bad pattern", 1, ["maskllm prune: error: pattern 'half': wanted N:M"]),
        ("bad path", 1, ["maskllm prune: error: ", "nowhere: no such directory"]),
        ("no data", 1, ["maskllm prune: error: ", "no-data: wanted an indexed dataset's prefix"]),
        ("foreign output", 1, ["maskllm prune: error: ", "foreign/release: exists and is not a checkpoint of this program"]),
        ("one rank only", 1, ["maskllm prune: error: ", ".blocked.layers: File exists"]),
    ],
)
def test_an_error_is_reported_once_in_the_job(mistake, status, words, job):
    assert job.statuses[mistake] == [status, status]
    assert len(job.complaints(*words)) == 1, job.errors[-4000:]


def test_nothing_else_is_reported(job):
    assert len(job.complaints("error: ")) == 6, job.errors[-4000:]
    assert "Traceback" not in job.errors
    assert not (job.folder / "never").exists()
    assert list((job.folder / "foreign" / "release").iterdir()) == []
