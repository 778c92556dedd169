"""All measurements and all tables. CONTRIBUTING.md says how to add one.

In a command, `{data}` stands for the folder of real test data, `{quickstart}` for what `make quickstart` has written, `{dense}` for the
dense SmolLM2-135M in it, and `{work}` for a folder that the measurements of a group share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import tables
from benchmarks.results import Result


@dataclass(frozen=True)
class Measurement:
    """A command and the result file that it makes, docs/benchmarks/results/NAME.json."""

    name: str
    command: str
    """`--json FILE` is added to it, unless it writes `output`."""
    minutes: float
    """Expected on two cores."""
    sources: tuple[str, ...]
    """Paths whose change makes a result older."""
    tiny: str | None = None
    """Options of the run in the tests, which come after those of the command. None: another measurement tests the same program."""
    output: str | None = None
    """The JSON file that the command writes by itself."""
    cuda: bool = False
    """Whether it needs a CUDA GPU."""


@dataclass(frozen=True)
class Table:
    """A table of results, between the markers `<!-- benchmark:NAME -->` and `<!-- /benchmark:NAME -->` of any page."""

    name: str
    title: str
    """Its heading in docs/results.md."""
    measurements: tuple[str, ...]
    render: Callable[[Mapping[str, Result]], list[str]]
    """The Markdown lines from the results that there are, by the measurements' names."""


TRAINING = (
    "csrc",
    "maskllm/data",
    "maskllm/families",
    "maskllm/masking",
    "maskllm/megatron",
    "maskllm/ops",
    "maskllm/pruning",
    "maskllm/training",
    "megatron_patches",
)
"""What decides which masks and weights a training finds."""
PERPLEXITY = tuple(f"maskllm/evaluation/{name}.py" for name in ("huggingface", "perplexity", "text", "windows"))
ZERO_SHOT = tuple(f"maskllm/evaluation/{name}.py" for name in ("lm_eval_tasks", "task_files", "task_sets", "zero_shot"))

C4, WIKITEXT = "{data}/c4-sample.train.json", "{data}/wikitext-2-raw.test.txt"
QUALITY_ROWS = {
    "masks": ("5e-4", "1e-3", "2e-3"),
    "weights-ce": ("2e-4", "6e-4", "1e-3"),
    "weights-kl": ("2e-4", "6e-4", "1e-3"),
    "weights-squarehead": ("2e-4", "6e-4", "1e-3"),
    "weights-ce-kl": ("2e-4", "6e-4", "1e-3"),
    "both-ce-kl": ("2e-4", "6e-4", "1e-3"),
    "both-kl": ("2e-4", "6e-4", "1e-3"),
    "cast": ("3e-4", "1e-3", "2e-3"),
}
"""The learning rates that are tried for each recipe of benchmarks/quality.py."""


def _quality(row: str, minutes: float, tiny: str | None = None) -> Measurement:
    """A row of the comparison of ways to train: `weights-kl:6e-4` is the measurement quality/weights-kl-6e-4."""
    command = (
        f"python -m benchmarks.quality --hf {{dense}} --train-data {C4} --eval-data {WIKITEXT} --tasks-data {{data}}/zero-shot --limit 200 "
        f"--work {{work}} --row {row}"
    )
    return Measurement(f"quality/{row.replace(':', '-')}", command, minutes, (*TRAINING, *PERPLEXITY, *ZERO_SHOT), tiny)


_ALL = [
    Measurement(
        "quickstart",
        "make quickstart",
        minutes=20,
        sources=("maskllm/quickstart", *TRAINING, *PERPLEXITY),
        output="{quickstart}/report.json",
    ),
    *(_quality(row, 5) for row in ("dense", "magnitude", "wanda", "sparsegpt")),
    *(_quality(f"{recipe}:{rate}", 30) for recipe, rates in QUALITY_ROWS.items() for rate in rates),
]
MEASUREMENTS = {one.name: one for one in _ALL}


def _group(name: str) -> tuple[str, ...]:
    """The measurements whose names begin with `name` and a slash."""
    return tuple(one for one in MEASUREMENTS if one.startswith(f"{name}/"))


TABLES = {
    table.name: table
    for table in (
        Table("quickstart", "The quickstart", ("quickstart",), tables.quickstart),
        Table("quality", "Ways to train, at equal training tokens", _group("quality"), tables.quality),
    )
}
